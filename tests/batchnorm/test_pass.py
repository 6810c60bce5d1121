"""The pass: how it ends, in which precision it runs, and what it says of itself."""

from __future__ import annotations

import functools
import math
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    TensorDataset,
)

from ckptavg.batchnorm.refresh import refresh_norm
from ckptavg.errors import RefreshError, UserCodeError
from ckptavg.model import feeding
from tests.helpers_norm import (
    STATISTICS,
    Snapshot,
    assert_same_statistics,
    data_for,
    draw,
    make,
    norms,
)


def wide_net():
    """Layers of 64 to 256 channels, with a value of each for an example: the slowest to know."""
    torch.default_generator.manual_seed(0)
    return nn.Sequential(
        *(nn.Linear(256, 128), nn.BatchNorm1d(128), nn.ReLU()),
        *(nn.Linear(128, 256), nn.BatchNorm1d(256), nn.ReLU()),
        *(nn.Linear(256, 64), nn.BatchNorm1d(64)),
    )


class Rows(TensorDataset):
    """Examples of which a loader takes a batch at once."""

    def __getitems__(self, indices):
        return self.tensors[0][indices]


@functools.cache
def rows(count, factors):
    made = torch.Generator().manual_seed(0)
    data = torch.randn(count, factors, generator=made)
    return data if factors == 256 else data @ torch.randn(factors, 256, generator=made)


def shuffled(count, size, seed=0, factors=256):
    made = torch.Generator().manual_seed(seed)
    data = Rows(rows(count, factors))
    return DataLoader(data, size, shuffle=True, generator=made, collate_fn=lambda batch: batch)


def distance(model, other):
    """Root mean square over the channels, in the layer that is farthest: means and log stds."""
    means, stds = [], []
    for one, two in zip(norms(model), norms(other), strict=True):
        variance = two.running_var.double() + two.eps
        gap = (one.running_mean.double() - two.running_mean.double()).square() / variance
        means.append(float(gap.mean().sqrt()))
        ratio = (one.running_var.double() + one.eps) / variance
        stds.append(float((ratio.log() / 2).square().mean().sqrt()))
    return max(means), max(stds)


class TestTolerance:
    @pytest.mark.parametrize("estimator", ["paper", "torch", "exact"])
    def test_takes_a_part_of_the_data_and_is_kept(self, estimator):
        model, other = wide_net(), wide_net()
        loader = shuffled(30_000, 128)
        report = refresh_norm(model, loader, estimator=estimator, tol=0.02)
        refresh_norm(other, loader, estimator=estimator)
        assert report.converged
        assert 2048 <= report.samples < 15_000
        stated = [
            max(getattr(layer, name) for layer in report.layers)
            for name in ("mean_error", "log_std_error")
        ]
        assert max(stated) <= 0.02
        assert all(real <= said for real, said in zip(distance(model, other), stated, strict=True))

    @pytest.mark.parametrize("factors", [256, 4])
    def test_is_kept_nearly_always(self, factors):
        """However much the channels have in common."""
        full = wide_net()
        refresh_norm(full, shuffled(20_000, 500, factors=factors))
        kept = []
        for seed in range(8):
            model, loader = wide_net(), shuffled(20_000, 100, factors=factors)
            assert loader.generator is not None
            loader.generator.manual_seed(1000 + seed)
            refresh_norm(model, loader, tol=0.03)
            kept.append(max(distance(model, full)) <= 0.03)
        assert sum(kept) >= 7

    def test_asks_for_2048_examples_and_8_batches(self):
        still = [torch.tensor([[1.0] * 5, [2.0] * 5] * 64)] * 40
        report = refresh_norm(make("mlp"), still, tol=0.5)
        assert (report.converged, report.samples, report.batches) == (True, 2048, 16)
        report = refresh_norm(make("mlp"), [torch.cat(still[:8])] * 40, tol=0.5)
        assert (report.converged, report.batches) == (True, 8)

    def test_that_the_data_do_not_reach_is_reported(self):
        report = refresh_norm(make("mlp"), data_for("mlp"), tol=1e-6)
        assert (report.converged, report.batches) == (False, 4)

    def test_of_an_endless_loader_needs_a_limit_all_the_same(self):
        with pytest.raises(RefreshError, match="may be endless"):
            refresh_norm(make("mlp"), DataLoader(Endless(), batch_size=None), tol=0.1)

    def test_leaves_the_rest_of_the_loader_alone(self):
        rest = iter(draw((128,) * 1000, 5))
        report = refresh_norm(make("mlp"), rest, tol=0.05)
        assert report.converged
        assert len(list(rest)) == 1000 - report.batches

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            ({"max_samples": 0}, "`max_samples` must be at least 1, not 0"),
            ({"device": "nope"}, "there is no device 'nope'"),
        ],
    )
    def test_and_other_options_have_to_be_possible(self, options, message):
        with pytest.raises(RefreshError, match=message):
            refresh_norm(make("mlp"), data_for("mlp"), **options)

    @pytest.mark.parametrize("tol", [0, -1, math.nan, math.inf])
    def test_has_to_be_one(self, tol):
        with pytest.raises(RefreshError, match="the tolerance cannot be"):
            refresh_norm(make("mlp"), data_for("mlp"), tol=tol)

    def test_errors_of_a_single_batch_are_not_known(self):
        [layer, _] = refresh_norm(make("mlp"), data_for("mlp")[:1]).layers
        assert (layer.mean_error, layer.log_std_error) == (math.inf, math.inf)


class TestErrors:
    """Where the calls of a layer are not independent, or the variance is that of the means."""

    @pytest.mark.parametrize("estimator", ["paper", "torch", "exact"])
    def test_of_a_layer_that_is_called_often_are_those_of_its_batches(self, estimator):
        model: Any = nn.Sequential(nn.BatchNorm1d(512))
        data = draw((32,) * 40, 512, mean=0, std=1)

        def forward(model, batch):
            for _ in range(16):
                model(batch)

        [layer] = refresh_norm(model, data, forward=forward, estimator=estimator).layers
        real = model[0].running_mean.double().square().mean().sqrt()
        assert layer.calls == 16 * 40 == model[0].num_batches_tracked
        assert 1.7 * float(real) <= layer.mean_error <= 2.3 * float(real)  # two standard errors

    @pytest.mark.parametrize("kind", ["pairs", "unlike"])
    def test_of_a_variance_of_means_are_too(self, kind):
        model: Any = nn.Sequential(nn.BatchNorm1d(512))
        made = torch.Generator().manual_seed(0)
        shift = torch.randn(60, 1, 512, generator=made)
        size, scale = (2, 1.0) if kind == "pairs" else (64, 0.05)
        data = torch.randn(60, size, 512, generator=made) * scale + (kind != "pairs") * shift
        [layer] = refresh_norm(model, list(data), estimator="exact").layers
        true = torch.tensor(1.0) if kind == "pairs" else torch.tensor(1 + scale**2)
        real = (model[0].running_var.double() / true).log().square().mean().sqrt() / 2
        assert layer.log_std_error == pytest.approx(2 * float(real), rel=0.3)


class Endless(IterableDataset[torch.Tensor]):
    def __init__(self, length=None):
        self.length = length

    def __iter__(self):
        yield from draw((8,) * 5, 5)


class Long(Endless):
    def __len__(self):
        return 5


class Wrong(list[torch.Tensor]):
    """A loader whose length is not the number of its batches."""

    def __len__(self):
        return 3


ORDERED = "the loader does not shuffle"


class TestLoaders:
    @pytest.mark.parametrize("made", [Endless, lambda: DataLoader(Endless(), batch_size=None)])
    def test_that_may_be_endless_need_a_limit(self, made):
        model = make("mlp")
        before = Snapshot(model)
        with pytest.raises(RefreshError, match=r"may be endless; .*`max_samples`"):
            refresh_norm(model, made())
        before.check()
        assert refresh_norm(model, made(), max_samples=20).batches == 3

    @pytest.mark.parametrize(
        ("make_loader", "count", "said"),
        [
            (Wrong, 106, None),
            (Wrong, 107, "106 batches, though its length is 3, and has not ended"),
            (iter, 501, "500 batches, and has not ended"),
        ],
    )
    def test_that_do_not_end_are_said_to_be_so_once(
        self, caplog, monkeypatch, make_loader, count, said
    ):
        monkeypatch.setattr(feeding, "_PATIENCE", 10_000 if make_loader is Wrong else 500)
        batch = torch.randn(2, 1)
        refresh_norm(nn.BatchNorm1d(1), make_loader([batch] * count))
        lines = [each.getMessage() for each in caplog.records if "not ended" in each.getMessage()]
        assert len(lines) == (said is not None)
        assert said is None or said in lines[0]
        caplog.clear()
        refresh_norm(nn.BatchNorm1d(1), make_loader([batch] * count), max_samples=2 * count)
        assert "no end" not in caplog.text

    @pytest.mark.parametrize("made", [Long, lambda: DataLoader(Long(), batch_size=None)])
    def test_that_know_their_length_need_none(self, made):
        assert refresh_norm(make("mlp"), made()).batches == 5

    @pytest.mark.parametrize(
        ("shuffle", "limit", "warned"),
        [
            (False, {"max_samples": 20}, "and the pass may end before the data do"),
            (False, {"tol": 0.1, "estimator": "exact"}, "and the pass may end before the data do"),
            (False, {"max_samples": 39}, "and the pass may end before the data do"),
            (False, {"max_samples": 40}, "if the data are sorted"),
            (False, {}, "if the data are sorted"),
            (False, {"estimator": "torch"}, "if the data are sorted"),
            (False, {"estimator": "exact"}, "if the data are sorted"),
            (True, {"max_samples": 20}, None),
            (True, {"tol": 0.1}, None),
            (True, {}, None),
        ],
        ids=str,
    )
    def test_that_do_not_shuffle_are_warned_of(self, shuffle, limit, warned, notices):
        loader = DataLoader(TensorDataset(*draw((40,), 5)), batch_size=8, shuffle=shuffle)
        refresh_norm(make("mlp"), loader, **limit)
        assert (ORDERED in notices.text) is (warned is not None)
        assert (warned or "") in notices.text

    def test_that_are_sorted_give_wrong_variances_but_for_exact(self):
        """What the warning is about: classes apart, and batches of one class each."""
        data = torch.cat([torch.randn(200, 5) + 8 * label for label in range(4)])
        model: Any = nn.BatchNorm1d(5)
        variances = {}
        for estimator in ("paper", "exact"):
            refresh_norm(model, DataLoader(TensorDataset(data), 25), estimator=estimator)
            variances[estimator] = model.running_var.mean() / data.var(0).mean()
        assert variances["paper"] < 0.1
        assert variances["exact"] == pytest.approx(1, rel=0.01)

    def test_of_other_kinds_may_do_as_they_like(self, notices):
        refresh_norm(make("mlp"), data_for("mlp"), max_samples=20)
        assert notices.text == ""


class TestPrecision:
    @pytest.mark.parametrize("name", ["mlp", "conv2d", "conv3d", "sync"])
    @pytest.mark.parametrize("estimator", ["paper", "exact"])
    def test_bf16_is_that_of_the_forward_and_not_of_the_statistics(self, name, estimator):
        seen: list[torch.Tensor] = []
        model = make(name)

        def forward(model, batch):
            with torch.no_grad():
                seen.append(model[0](batch))
            assert torch.is_autocast_enabled("cpu")
            assert model(batch).isfinite().all()

        report = refresh_norm(
            model, data_for(name, (16,) * 4), forward=forward, amp="bf16", estimator=estimator
        )
        assert {one.dtype for one in seen} == {torch.bfloat16}
        assert len(report.layers) == len(norms(model))
        # The first layer's inputs are bfloat16; its statistics are theirs to float32's precision.
        given = [one.double().transpose(0, 1).flatten(1) for one in seen]
        layer = norms(model)[0]
        assert layer.running_mean.dtype == torch.float32
        mean = torch.cat(given, 1).mean(1)
        torch.testing.assert_close(layer.running_mean.double(), mean, rtol=2e-6, atol=2e-6)
        if estimator == "exact":
            variance = torch.cat(given, 1).var(1, correction=0)
        else:
            variance = torch.stack([one.var(1) for one in given]).mean(0)
        torch.testing.assert_close(layer.running_var.double(), variance, rtol=2e-6, atol=0)

    def test_of_bf16_is_near_that_of_float32(self):
        model, other = make("conv2d"), make("conv2d")
        refresh_norm(model, data_for("conv2d"), amp="bf16")
        refresh_norm(other, data_for("conv2d"))
        assert_same_statistics(model, other, 0.02)

    def test_of_16_bits_is_no_other(self):
        with pytest.raises(RefreshError, match="`amp` must be one of bf16, None, not 'fp16'"):
            refresh_norm(make("mlp"), data_for("mlp"), amp="fp16")  # type: ignore[arg-type]


class Viewing(nn.Sequential):
    """What many a network does, and strides of channels_last do not allow."""

    def forward(self, images):
        for layer in self:
            images = layer(images)
        return images.view(len(images), -1)


class TestMemoryFormat:
    def test_that_the_model_does_not_take_is_given_up(self, notices):
        model, other = (Viewing(*make("conv2d")) for _ in range(2))
        before = Snapshot(model)
        refresh_norm(model, data_for("conv2d"))
        refresh_norm(other, data_for("conv2d"), memory_format="contiguous")
        assert_same_statistics(model, other, 1e-12)
        before.check(but=STATISTICS)
        assert notices.text.count("trying contiguous images: view size") == 1

    def test_is_given_up_after_a_batch_that_does_not_fit_too(self):
        class Headed(nn.Sequential):
            def forward(self, images):
                found = images
                for layer in list(self)[:-1]:
                    found = layer(found)
                return self[-1](found.view(len(images), -1)[:, :4])

        model = Headed(*make("conv2d"), nn.BatchNorm1d(4))
        report = refresh_norm(model, data_for("conv2d", (1, 8, 8)))
        assert (report.batches, report.skipped) == (2, 1)

    def test_is_given_up_with_the_batch_as_it_was(self):
        """The first try has written into its images."""

        class Writing(Viewing):
            def forward(self, images):
                images.sub_(5).div_(3)
                return super().forward(images)

        model, other = (Writing(*make("conv2d")) for _ in range(2))
        refresh_norm(model, data_for("conv2d"))
        refresh_norm(other, data_for("conv2d"), memory_format="contiguous")
        assert_same_statistics(model, other, 1e-12)

    def test_is_given_up_without_another_look_at_what_a_layer_normalises(self):
        class Scaled(nn.BatchNorm2d):
            def forward(self, values):
                return super().forward(values * 2)

        torch.manual_seed(0)
        nets = [Viewing(nn.Conv2d(3, 8, 3), Scaled(8)) for _ in range(2)]
        nets[1].load_state_dict(nets[0].state_dict())
        refresh_norm(nets[0], data_for("conv2d")[:1])
        refresh_norm(nets[1], data_for("conv2d")[:1], memory_format="contiguous")
        assert_same_statistics(nets[0], nets[1], 1e-12)

    def test_is_not_given_up_where_it_was_asked_for(self):
        model = Viewing(*make("conv2d"))
        with pytest.raises(UserCodeError, match="raised RuntimeError: view size is not"):
            refresh_norm(model, data_for("conv2d"), memory_format="channels_last")

    def test_is_no_excuse_for_other_errors(self):
        class Broken(Viewing):
            def forward(self, images):
                raise RuntimeError(f"not {images.is_contiguous()}")

        model = Broken(*make("conv2d"))
        before = Snapshot(model)
        with pytest.raises(UserCodeError, match="not True"):
            refresh_norm(model, data_for("conv2d"))
        before.check()


class TestReport:
    def test_has_the_statistics_of_each_layer(self):
        model = make("mlp")
        old = {name: buffer.clone() for name, buffer in model.named_buffers()}
        report = refresh_norm(model, data_for("mlp"))
        assert [layer.name for layer in report.layers] == ["1", "4"]
        for layer in report.layers:
            for held, state in ((layer.old, old), (layer.new, dict(model.named_buffers()))):
                name = layer.name
                assert held is not None
                assert torch.equal(held.mean, state[f"{name}.running_mean"].double())
                assert torch.equal(held.variance, state[f"{name}.running_var"].double())
                assert held.batches == int(state[f"{name}.num_batches_tracked"])


@pytest.mark.parametrize("shuffle", [True, False])
def test_a_batch_sampler_of_the_users_tells_whether_it_shuffles(shuffle, notices):
    data = TensorDataset(*draw((40,), 5))
    sampler = RandomSampler(data) if shuffle else SequentialSampler(data)
    loader = DataLoader(data, batch_sampler=BatchSampler(sampler, 8, drop_last=False))
    refresh_norm(make("mlp"), loader)
    assert (ORDERED in notices.text) is not shuffle
