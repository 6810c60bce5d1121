"""Tiny models and runs of the libraries, and what their tests share."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import tokenizers
import torch
import transformers

from tests.oracle import StateDict

WORDS = 200


def llama(seed: int = 0, *, tied: bool = True) -> Any:
    """A language model whose head is its embedding, if tied."""
    torch.manual_seed(seed)
    config = transformers.LlamaConfig(
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=WORDS,
        tie_word_embeddings=tied,
        pad_token_id=0,
    )
    return transformers.LlamaForCausalLM(config)


def tokenizer(**options: Any) -> Any:
    """A tokenizer of as many words as the models know."""
    words = {"[PAD]": 0, "[UNK]": 1} | {f"w{number}": number for number in range(2, WORDS)}
    model = tokenizers.models.WordLevel(words, unk_token="[UNK]")  # noqa: S106 - no password
    made = tokenizers.Tokenizer(model)
    made.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="[PAD]", unk_token="[UNK]", **options  # noqa: S106
    )  # fmt: skip


class Sentences(torch.utils.data.Dataset[dict[str, torch.Tensor]]):
    """Random ones, the same each time."""

    def __len__(self) -> int:
        return 24

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        made = torch.Generator().manual_seed(index)
        ids = torch.randint(0, WORDS, (8,), generator=made)
        return {"input_ids": ids, "labels": ids}


def trainer(folder: Path, model: Any, **options: Any) -> Any:
    """A trainer of three checkpoints, 4, 8 and 12, whose names do not sort as their numbers."""
    arguments = transformers.TrainingArguments(
        output_dir=str(folder),
        per_device_train_batch_size=4,
        learning_rate=0.02,
        max_steps=12,
        save_steps=4,
        report_to=[],
        use_cpu=True,
        disable_tqdm=True,
    )
    return transformers.Trainer(
        model=model,
        args=arguments,
        train_dataset=Sentences(),
        processing_class=tokenizer(),
        **options,
    )


def differ(states: Sequence[StateDict]) -> bool:
    """Whether a mean of them is none of them: a test that cannot fail tells nothing."""
    names = [name for name, value in states[0].items() if value.is_floating_point()]
    return all(
        any(not torch.equal(one[name], other[name]) for name in names)
        for one, other in itertools.pairwise(states)
    )
