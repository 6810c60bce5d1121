"""Several state dicts of one torch file, averaged in one go: the networks of a GAN."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import ckptavg
from ckptavg.errors import CkptAvgError, MismatchError, OutputError, SelectionError
from ckptavg.formats import open_checkpoint
from ckptavg.formats.checkpoint import Checkpoint
from tests.helpers import outcome
from tests.oracle import assert_mean, same_bits

KEYS = ("generator", "discriminator")


def make_generator() -> nn.Module:
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))


def make_discriminator() -> nn.Module:
    return nn.Sequential(nn.Linear(2, 5), nn.Linear(5, 1))


def gan(step: int) -> dict[str, Any]:
    """What a training loop saves of two networks after a step."""
    torch.manual_seed(step)
    generator, discriminator = make_generator(), make_discriminator()
    generator(torch.randn(8, 3))
    optimizer = torch.optim.SGD(generator.parameters(), lr=0.1, momentum=0.9)
    generator(torch.randn(8, 3)).sum().backward()
    optimizer.step()
    return {
        "generator": generator.state_dict(),
        "discriminator": discriminator.state_dict(),
        "optimizer": optimizer.state_dict(),
        "epoch": step,
    }


@pytest.fixture
def in_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def save(roots: list[Any]) -> list[Any]:
    Path("run").mkdir()
    for step, root in enumerate(roots):
        torch.save(root, f"run/step_{step}.pt")
    return roots


def average(output: str = "gan.pt", key: Any = KEYS, **options: Any) -> Any:
    """What `torch.load` returns of the average of `run`."""
    ckptavg.average("run", output, key=key, fsync=False, **options)
    return torch.load(output)


@pytest.mark.usefixtures("in_folder")
class TestSeveral:
    @pytest.mark.parametrize("named", [("generator", "discriminator"), ("*",)])
    def test_each_is_the_mean_under_its_own_key(self, named):
        saved = save([gan(step) for step in range(3)])
        options = [text for key in named for text in ("--key", key)]
        code, said, messages = outcome("average", "run", "-o", "gan.pt", *options, "--no-fsync")
        assert code == 0, messages
        assert "ckptavg bn-refresh gan.pt --key KEY --model" in said
        result = torch.load("gan.pt")
        assert list(result) == [*KEYS]
        for key in KEYS:
            assert_mean(result[key], [root[key] for root in saved])
            assert list(result[key]) == list(saved[-1][key])
            assert result[key]._metadata == saved[-1][key]._metadata
        make_generator().load_state_dict(result["generator"], strict=True)
        make_discriminator().load_state_dict(result["discriminator"], strict=True)

    def test_more_than_anybody_has_are_refused_and_not_cut_off(self):
        save([{f"model_{number}": {"w": torch.ones(2)} for number in range(101)}] * 2)
        with pytest.raises(SelectionError, match="more than 100 state dicts"):
            average(key="*")
        assert list(average(key=["model_100", "model_7"])) == ["model_100", "model_7"]

    def test_of_a_hundred_each_name_is_looked_up_a_few_times(self, monkeypatch):
        state = {f"{number}.w": torch.ones(1) for number in range(10)}
        save([{f"model_{number}": state for number in range(100)}] * 2)
        calls = []

        def counted(self: Checkpoint, name: str) -> str:
            calls.append(name)
            return model_of(self, name)

        model_of = Checkpoint.model_of
        monkeypatch.setattr(Checkpoint, "model_of", counted)
        assert len(average(key="*")) == 100
        assert len(calls) < 10 * 2 * 1_000

    @pytest.mark.parametrize("key", [KEYS, "*"])
    def test_in_a_container_all_else_is_the_last_one_s(self, key):
        saved = save([gan(step) for step in range(3)])
        result = average(key=key, container="last")
        assert list(result) == list(saved[-1])
        for name in KEYS:
            assert_mean(result[name], [root[name] for root in saved])
        assert result["epoch"] == 2
        state = saved[-1]["optimizer"]["state"]
        for number, moments in result["optimizer"]["state"].items():
            assert same_bits(moments["momentum_buffer"], state[number]["momentum_buffer"])

    def test_a_file_before_torch_1_6_holds_them_too(self):
        roots = [gan(step) for step in range(2)]
        Path("run").mkdir()
        for step, root in enumerate(roots):
            torch.save(root, f"run/step_{step}.pt", _use_new_zipfile_serialization=False)
        for container in ("weights", "last"):
            result = average(f"{container}.pt", container=container)
            for key in KEYS:
                assert_mean(result[key], [root[key] for root in roots])

    def test_those_below_other_keys_stay_there(self):
        roots = [
            {"net": {key: gan(step)[key] for key in KEYS}, "G.ema": gan(step)["generator"]}
            for step in range(2)
        ]
        save(roots)
        result = average(key="*")
        assert list(result) == ["net", "G.ema"]
        assert list(result["net"]) == [*KEYS]
        for key in KEYS:
            assert_mean(result["net"][key], [root["net"][key] for root in roots])
        assert_mean(result["G.ema"], [root["G.ema"] for root in roots])
        named = average("named.pt", key=["net.discriminator", "G.ema"])
        assert list(named) == ["net", "G.ema"]
        assert list(named["net"]) == ["discriminator"]

    def test_tensors_at_the_top_stay_there(self):
        roots = [
            {"weight": torch.full((2,), float(step)), "ema": {"weight": torch.ones(2) * step}}
            for step in (1, 2)
        ]
        save(roots)
        result = average(key=["", "ema"])
        assert same_bits(result["weight"], torch.full((2,), 1.5))
        assert same_bits(result["ema"]["weight"], torch.full((2,), 1.5))

    def test_tensors_that_both_share_stay_shared(self):
        def tied(step: int) -> dict[str, Any]:
            embedding = torch.randn(4, 2, generator=torch.Generator().manual_seed(step))
            return {
                "generator": {"embed.weight": embedding, "bias": torch.ones(1) * step},
                "discriminator": {"embed.weight": embedding},
            }

        saved = save([tied(step) for step in range(2)])
        for container in ("weights", "last"):
            result = average(f"{container}.pt", container=container)
            one, other = (result[key]["embed.weight"] for key in KEYS)
            assert one.data_ptr() == other.data_ptr()
            assert_mean(result["generator"], [root["generator"] for root in saved])

    def test_each_has_its_own_wrapper(self):
        def wrapped(step: int) -> dict[str, Any]:
            generator, discriminator = make_generator(), make_discriminator()
            return {
                "generator": nn.DataParallel(generator).state_dict(),
                "discriminator": discriminator.state_dict(),
                "epoch": step,
            }

        saved = save([wrapped(step) for step in range(2)])
        result = average()
        versions = getattr(make_generator().state_dict(), "_metadata", None)
        assert list(result["generator"]) == list(make_generator().state_dict())
        assert result["generator"]._metadata == versions
        assert result["discriminator"]._metadata == saved[-1]["discriminator"]._metadata
        make_generator().load_state_dict(result["generator"], strict=True)
        assert_mean(result["discriminator"], [root["discriminator"] for root in saved])
        kept = average("kept.pt", keep_prefix=True)
        assert_mean(kept["generator"], [root["generator"] for root in saved])
        assert ckptavg.verify("gan.pt", ["run"]).sources == 2

    def test_one_that_the_last_has_alone_is_left_out_or_an_error(self):
        save([{"generator": gan(0)["generator"]}, gan(1)])
        with pytest.raises(SelectionError, match=r"'discriminator'.*there are: generator"):
            average()
        with pytest.raises(MismatchError, match=r"discriminator/.*missing in .*step_0.pt") as error:
            average(key="*")
        assert "\n  4 tensors such as discriminator/0.weight: missing" in str(error.value)
        assert "`skip` " in str(error.value)
        result = average(key="*", skip="^discriminator/")
        assert list(result) == ["generator"]
        assert ckptavg.verify("gan.pt", ["run"]).compared == len(result["generator"])

    def test_a_name_beside_the_star_must_be_there(self):
        save([gan(step) for step in range(2)])
        code, _, message = outcome("average", "run", "-o", "gan.pt", "--key", "*", "--key", "nope")
        assert code == 1
        assert "no state dict 'nope' in it; there are: generator, discriminator" in message

    def test_patterns_match_names_that_begin_with_the_key(self):
        saved = save([gan(step) for step in range(2)])
        result = average(skip=r"^generator/1\.", take_last="^discriminator/0")
        assert "1.weight" not in result["generator"]
        last = saved[-1]["discriminator"]
        assert same_bits(result["discriminator"]["0.weight"], last["0.weight"])
        assert not same_bits(result["discriminator"]["1.weight"], last["1.weight"])

    @pytest.mark.parametrize("output", ["gan.safetensors", "gan/"])
    def test_other_outputs_are_refused_with_the_way_out(self, output):
        save([gan(step) for step in range(2)])
        code, _, message = outcome("average", "run", "-o", output, "--key", "*")
        assert code == 1
        assert "only a torch file holds the models" in message
        assert "generator, discriminator" in message
        assert "--key" in message
        with pytest.raises(OutputError, match="torch file"):
            average("gan/", format="dcp")

    def test_several_averages_are_torch_files(self):
        saved = save([gan(step) for step in range(3)])
        ckptavg.average_many("run", "out", key="*", weights="uniform,linear", fsync=False)
        result = torch.load("out/uniform.pt")
        assert_mean(result["generator"], [root["generator"] for root in saved])
        assert Path("out/linear.pt").is_file()

    def test_directories_are_refused(self):
        Path("run/step_1").mkdir(parents=True)
        torch.save(gan(1), "run/step_1/pytorch_model.bin")
        Path("run/step_1/config.json").write_text("{}")
        with pytest.raises(SelectionError, match="choose one with `key`"):
            average()
        with pytest.raises(SelectionError, match="only a torch file holds several"):
            ckptavg.convert("run/step_1", "gan.pt", key="*")


@pytest.mark.usefixtures("in_folder")
class TestWhatComesAfter:
    @pytest.mark.parametrize("options", [{}, {"container": "last"}, {"skip": "weight"}])
    def test_verify_makes_all_of_them_again(self, options):
        save([gan(step) for step in range(3)])
        result = average(**options)
        tensors = sum(len(result[key]) for key in KEYS)
        assert ckptavg.verify("gan.pt", ["run"]).compared == tensors
        code, _, message = outcome("verify", "gan.pt", "run/step_0.pt", "run/step_1.pt")
        assert code == 1
        assert "step_2.pt" in message

    def test_verify_finds_a_change_in_the_second(self):
        save([gan(step) for step in range(2)])
        average()
        place = open_checkpoint(Path("gan.pt"), key="discriminator").tensors["1.bias"].offset
        data = bytearray(Path("gan.pt").read_bytes())
        data[place] ^= 1
        Path("gan.pt").write_bytes(data)
        with pytest.raises(CkptAvgError, match=r"discriminator/1\.bias"):
            ckptavg.verify("gan.pt", ["run"])

    def test_the_provenance_names_the_keys(self):
        save([gan(step) for step in range(2)])
        average(key="*")
        made = open_checkpoint(Path("gan.pt"), key="generator").provenance
        assert made is not None
        assert [source["key"] for source in made["sources"]] == [[*KEYS]] * 2

    def test_it_is_an_average_in_the_eyes_of_another_run(self):
        save([gan(step) for step in range(2)])
        average("run/gan.pt")
        assert len(ckptavg.average("run", "again.pt", key="*", fsync=False).sources) == 2

    def test_an_update_folds_another_checkpoint_in(self):
        saved = save([gan(step) for step in range(2)])
        average()
        torch.save(third := gan(2), "run/step_2.pt")
        ckptavg.average(["gan.pt", "run/step_2.pt"], "new.pt", key="*", update=True, fsync=False)
        result = torch.load("new.pt")
        for key in KEYS:
            for name, value in result[key].items():
                if value.is_floating_point():
                    mean = sum(root[key][name].double() for root in (*saved, third)) / 3
                    assert torch.allclose(value.double(), mean, atol=1e-6)

    def test_inspect_counts_the_tensors_of_all(self):
        save([root := gan(0)])
        code, shown, _ = outcome("inspect", "run/step_0.pt", "--key", "*", "--json")
        assert code == 0
        [content] = json.loads(shown)["checkpoints"]
        assert content["models"] == [*KEYS]
        assert content["tensors"] == sum(len(root[key]) for key in KEYS)

    def test_convert_takes_some_out_of_a_training_checkpoint(self):
        save([root := gan(0)])
        code, _, message = outcome(
            "convert", "run/step_0.pt", "-o", "gan.pt", "--key", "generator", "--key",
            "discriminator", "--no-fsync",
        )  # fmt: skip
        assert code == 0, message
        result = torch.load("gan.pt")
        assert list(result) == [*KEYS]
        for key in KEYS:
            assert_mean(result[key], [root[key]])

    def test_all_of_a_file_that_is_one_state_dict_is_that(self):
        save([gan(step)["generator"] for step in range(2)])
        result = average(key="*")
        assert list(result) == list(make_generator().state_dict())

    @pytest.mark.parametrize("output", ["one.pt", "one.safetensors"])
    def test_one_of_them_alone_is_verified_against_all(self, output):
        roots = [{"G.ema": gan(step)["generator"], **gan(step + 5)} for step in range(2)]
        save(roots)
        average(key="*")
        ckptavg.convert("gan.pt", "two.pt", key=["G.ema", "generator"], fsync=False)
        ckptavg.convert("two.pt", output, key="G.ema", fsync=False)
        count = len(roots[0]["G.ema"])
        assert ckptavg.verify("two.pt", ["run"]).compared == 2 * count
        assert ckptavg.verify(output, ["run"]).compared == count
        ckptavg.refresh_checkpoint(
            "gan.pt", output, model=make_generator, loader=[torch.randn(4, 3)], key="G.ema",
            force=True,
        )  # fmt: skip
        again = ckptavg.verify(output, ["run"])
        assert (again.compared, again.refreshed) == (count - 3, 3)
        state = torch.load("run/step_1.pt")
        state["G.ema"]["0.weight"][0] += 1
        torch.save(state, "run/step_1.pt")
        with pytest.raises(CkptAvgError, match=r"step_1\.pt: has other values"):
            ckptavg.verify(output, ["run"])

    def test_a_frozen_layer_stays_frozen_in_a_file_of_its_own(self):
        roots = [gan(step) for step in (1, 2)]
        for root in roots:
            root["discriminator"] = gan(root["epoch"] + 5)["generator"]
            root["generator"] = gan(0)["generator"] | {"0.bias": torch.ones(4) * root["epoch"]}
        save(roots)
        average()
        ckptavg.convert("gan.pt", "one.pt", key="generator", fsync=False)
        with pytest.raises(CkptAvgError, match="no norm layer was refreshed"):
            ckptavg.refresh_checkpoint(
                "one.pt", None, model=make_generator, loader=[torch.randn(4, 3)]
            )

    def test_a_refresh_needs_one_of_them(self):
        save([gan(step) for step in range(2)])
        Path("train.py").write_text(
            "import torch\nfrom torch import nn\n"
            "def model():\n"
            "    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))\n"
            "loader = [torch.ones(4, 3) * n for n in range(3)]\n"
        )
        model = ("--model", "train.py:model", "--loader", "train.py:loader")
        code, _, message = outcome("average", "run", "-o", "gan.pt", "--key", "*", *model)
        assert code == 1
        assert "a refresh needs one state dict" in message
        assert not Path("gan.pt").exists()
        result = average()
        code, _, message = outcome("bn-refresh", "gan.pt", *model)
        assert code == 1
        assert "several state dicts" in message
        assert "--key" in message
        code, _, message = outcome("bn-refresh", "gan.pt", "--key", "generator", *model)
        assert code == 0, message
        refreshed = torch.load("gan.pt")
        before, after = (each["generator"]["1.running_mean"] for each in (result, refreshed))
        assert not torch.equal(before, after)
        assert_mean(refreshed["discriminator"], [result["discriminator"]])
        assert ckptavg.verify("gan.pt", ["run"]).refreshed == 3

    def test_after_a_refresh_of_one_the_others_are_stale_still(self):
        roots = [{"a": gan(step)["generator"], "b": gan(step + 5)["generator"]} for step in (1, 2)]
        save(roots)
        average(key="*")

        def refresh(key: str) -> Any:
            batches = [torch.randn(4, 3) for _ in range(3)]
            ckptavg.refresh_checkpoint(
                "gan.pt", None, model=make_generator, loader=batches, key=key
            )
            made = open_checkpoint(Path("gan.pt"), key=key).provenance
            assert made is not None
            return made["norm_stats"]

        first = refresh("a")
        assert (first["state"], first["stale"]) == ("partly refreshed", ["b/1"])
        again = refresh("a")
        assert (again["state"], again["stale"]) == ("partly refreshed", ["b/1"])
        assert refresh("b")["state"] == "refreshed"

    def test_a_layer_that_was_frozen_in_all_of_them_is_left_alone(self):
        frozen = gan(0)["generator"]
        roots = [gan(step) for step in (1, 2)]
        for root in roots:
            for name, value in frozen.items():
                if name.startswith("1."):
                    root["generator"][name] = value
            root["discriminator"] = gan(root["epoch"] + 5)["generator"]
        save(roots)
        average()
        with pytest.raises(CkptAvgError, match="no norm layer was refreshed"):
            ckptavg.refresh_checkpoint(
                "gan.pt", None, model=make_generator, loader=[torch.randn(4, 3)], key="generator"
            )
