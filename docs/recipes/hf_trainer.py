"""transformers' Trainer: batches are dicts, the average is a directory for `from_pretrained`."""

import subprocess

import torch
from torch.utils.data import DataLoader
from transformers import ResNetConfig, ResNetForImageClassification, Trainer, TrainingArguments

COMMANDS = """
ckptavg average run -o swa/ --start 50%
ckptavg bn-refresh swa/ -o refreshed/ \
    --model transformers:AutoModelForImageClassification.from_pretrained \
    --loader hf_trainer.py:train_loader
ckptavg evaluate run/checkpoint-320 swa/ refreshed/ \
    --model transformers:AutoModelForImageClassification.from_pretrained \
    --loader hf_trainer.py:held_out
"""


def data(seed, count):
    """Noisy images `[3, 16, 16]` with a bright stripe at one of four places."""
    torch.manual_seed(seed)
    labels, images = torch.randint(4, (count,)), torch.randn(count, 3, 16, 16)
    for k in range(4):
        images[labels == k, k % 3, 4 * k : 4 * k + 4] += 0.5
    return [{"pixel_values": x, "labels": y} for x, y in zip(images, labels)]


def train_loader():
    shuffle = torch.Generator().manual_seed(0)
    return DataLoader(data(1, 512), batch_size=16, shuffle=True, generator=shuffle)


def held_out():
    return DataLoader(data(2, 1000), batch_size=100)


def main():
    arguments = TrainingArguments(
        "run",
        num_train_epochs=10,
        per_device_train_batch_size=16,
        learning_rate=0.04,
        lr_scheduler_type="constant",
        save_strategy="epoch",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
    )
    torch.manual_seed(0)
    sizes = {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]}
    model = ResNetForImageClassification(ResNetConfig(**sizes, layer_type="basic", num_labels=4))
    Trainer(model, arguments, train_dataset=data(1, 512)).train()
    subprocess.run(["sh", "-exc", COMMANDS], check=True)


if __name__ == "__main__":
    main()
