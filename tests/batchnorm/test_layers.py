"""Which layers a refresh takes, and by which rule each of them keeps its statistics."""

from __future__ import annotations

import copy
import logging
import weakref
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812 - as everybody calls it

from ckptavg.batchnorm.refresh import refresh_norm
from ckptavg.errors import CkptAvgError, RefreshError, UserCodeError
from tests.helpers_norm import (
    STATISTICS,
    Renorm,
    Snapshot,
    assert_same_statistics,
    data_for,
    disturb,
    draw,
    explode,
    make,
)


def blocks():
    model = nn.ModuleDict({name: nn.BatchNorm1d(5) for name in ("stem", "body", "head")})
    model["body"] = nn.Sequential(nn.BatchNorm1d(5), nn.BatchNorm1d(5))
    torch.manual_seed(0)
    disturb(model)
    return model


def through(model, batch):
    for module in model.values():
        batch = module(batch)
    return batch


class TestChosen:
    @pytest.mark.parametrize(
        ("options", "expected"),
        [
            ({}, ["stem", "body.0", "body.1", "head"]),
            ({"layers": ["body"]}, ["body.0", "body.1"]),
            ({"layers": ["^body", "head$"]}, ["body.0", "body.1", "head"]),
            ({"skip_layers": ["body"]}, ["stem", "head"]),
            ({"skip_layers": [r"\.0", "stem"]}, ["body.1", "head"]),
            ({"layers": ["body"], "skip_layers": ["1"]}, ["body.0"]),
        ],
        ids=str,
    )
    def test_are_refreshed_and_no_others(self, options, expected, notices):
        model = blocks()
        before = Snapshot(model)
        report = refresh_norm(model, data_for("mlp"), forward=through, **options)
        assert [layer.name for layer in report.layers] == expected
        before.check(but=[f"{name}.{key}" for name in expected for key in STATISTICS])
        every = ["stem", "body.0", "body.1", "head"]
        assert [each.name for each in report.kept] == [
            name for name in every if name not in expected
        ]
        assert ("alone (as asked): " in notices.text) is (expected != every)

    def test_others_work_with_what_they_have(self):
        model = blocks()
        report = refresh_norm(model, data_for("mlp"), forward=through, skip_layers=["stem"])
        assert [(each.name, each.reason) for each in report.kept] == [("stem", "as asked")]
        other = blocks()
        other["stem"].eval()
        with torch.no_grad():
            given = torch.cat([other["stem"](batch) for batch in data_for("mlp")]).double()
        exact = blocks()
        options = {"skip_layers": ["stem"], "forward": through, "estimator": "exact"}
        for train_mode in ("norm", "full"):
            refresh_norm(exact, data_for("mlp"), train_mode=train_mode, **options)  # type: ignore[arg-type]
            found = exact["body"][0].running_mean.double()
            torch.testing.assert_close(found, given.mean(0), rtol=1e-6, atol=1e-6)

    @pytest.mark.parametrize(
        ("options", "message"),
        [
            (
                {"layers": ["foot"]},
                r"`layers` 'foot' matches no norm layer's name; the names are body\.0",
            ),
            ({"skip_layers": ["foot"]}, r"`skip_layers` 'foot' matches no norm layer's name"),
            ({"layers": ["("]}, r"'\(' is not a regular expression: .*"),
            ({"skip_layers": ["."]}, r"no norm layer was refreshed: 'stem', .* \(as asked\)"),
        ],
        ids=str,
    )
    def test_by_what_does_not_match_are_an_error(self, options, message):
        with pytest.raises(CkptAvgError, match=message):
            refresh_norm(blocks(), data_for("mlp"), forward=through, **options)

    def test_of_a_model_without_any_are_none_whatever_is_asked(self):
        report = refresh_norm(nn.Linear(3, 3), [torch.zeros(2, 3)], layers=["x"])
        assert (report.layers, report.kept) == ((), ())


class FrozenNorm(Renorm):
    """As detection models have it."""


class TestOthers:
    def test_with_running_statistics_are_spoken_of_and_left_alone(self, notices):
        model = nn.Sequential(nn.BatchNorm1d(5), Renorm(5), FrozenNorm(5), nn.BatchNorm1d(5))
        disturb(model)
        before = Snapshot(model)
        refresh_norm(model, data_for("mlp"))
        before.check(but=[f"{number}.{name}" for number in (0, 3) for name in STATISTICS])
        records = {one.getMessage(): one.levelno for one in notices.records}
        assert records == {
            "left 1 norm layer alone (Renorm is of a kind that is not refreshed): '1'": (
                logging.WARNING
            ),
            "left 1 norm layer alone (frozen, as FrozenNorm says): '2'": logging.INFO,
        }

    def test_many_are_one_line(self, notices):
        refresh_norm(nn.Sequential(nn.BatchNorm1d(5), *map(Renorm, [5] * 9)), data_for("mlp"))
        assert "left 9 norm layers alone" in notices.text
        assert "'5' and 4 more" in notices.text


SHAPES = {
    "1d": (nn.InstanceNorm1d, (3, 7)),
    "2d": (nn.InstanceNorm2d, (3, 5, 6)),
    "3d": (nn.InstanceNorm3d, (3, 4, 5, 2)),
}


class TestInstanceNorm:
    @pytest.mark.parametrize("memory_format", ["auto", "contiguous"])
    @pytest.mark.parametrize("name", SHAPES)
    @pytest.mark.parametrize("estimator", ["paper", "torch", "exact"])
    def test_has_the_means_over_the_instances(self, estimator, name, memory_format):
        kind, shape = SHAPES[name]
        layer: Any = kind(3, affine=True, track_running_stats=True)
        model = nn.Sequential(layer, nn.Identity())
        batches = draw((16, 16, 5), *shape)
        report = refresh_norm(model, batches, estimator=estimator, memory_format=memory_format)
        rows = [batch.double().flatten(2) for batch in batches]
        if estimator == "torch":
            mean = torch.stack([row.mean(2).mean(0) for row in rows]).mean(0)
            variance = torch.stack([row.var(2).mean(0) for row in rows]).mean(0)
        else:
            mean = torch.cat(rows).mean(2).mean(0)
            variance = torch.cat(rows).var(2).mean(0)
        torch.testing.assert_close(layer.running_mean.double(), mean, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(layer.running_var.double(), variance, rtol=1e-5, atol=1e-6)
        assert layer.num_batches_tracked == 0  # torch does not count either
        assert report.layers[0].calls == 3

    def test_is_what_torch_itself_ends_with(self):
        """Its own moving average, with a momentum that makes a mean of it."""
        layer = nn.InstanceNorm2d(3, track_running_stats=True)
        own = copy.deepcopy(layer).train()
        batches = draw((8,) * 6, 3, 5, 6)
        for number, batch in enumerate(batches, 1):
            own.momentum = 1 / number
            own(batch)
        refresh_norm(layer, batches, memory_format="contiguous")
        torch.testing.assert_close(layer.running_mean, own.running_mean)
        torch.testing.assert_close(layer.running_var, own.running_var)

    def test_may_be_given_one_instance_without_a_batch(self):
        layer: Any = nn.InstanceNorm1d(3, track_running_stats=True)
        [data] = draw((4,), 3, 9)
        refresh_norm(layer, list(data))
        expected = data.double().mean(2).mean(0)
        torch.testing.assert_close(layer.running_mean.double(), expected, rtol=1e-5, atol=1e-6)

    @pytest.mark.parametrize("tracks", [False, True])
    def test_with_one_value_an_instance_leaves_that_batch_out(self, tracks):
        model = nn.Sequential(
            nn.BatchNorm1d(3), nn.InstanceNorm1d(3, track_running_stats=tracks), nn.BatchNorm1d(3)
        )
        batches = [*draw((4, 4), 3, 6), *draw((4,), 3, 1)]
        report = refresh_norm(model, batches)
        assert (report.batches, report.skipped) == (2, 1)

    def test_without_statistics_is_none(self):
        model = nn.Sequential(nn.InstanceNorm1d(3), nn.BatchNorm1d(3))
        assert [layer.name for layer in refresh_norm(model, draw((4,), 3, 6)).layers] == ["1"]


class SubBatchNorm3d(nn.Module):
    """PySlowFast's, https://github.com/facebookresearch/SlowFast: `batchnorm_helper.py`."""

    def __init__(self, num_splits, num_features):
        super().__init__()
        self.num_splits, self.num_features = num_splits, num_features
        self.weight = nn.Parameter(torch.ones(num_features))
        self.bias = nn.Parameter(torch.zeros(num_features))
        self.bn = nn.BatchNorm3d(num_features, affine=False)
        self.split_bn = nn.BatchNorm3d(num_features * num_splits, affine=False)

    def aggregate_stats(self):
        means = self.split_bn.running_mean.view(self.num_splits, -1)  # type: ignore[union-attr]
        stds = self.split_bn.running_var.view(self.num_splits, -1)  # type: ignore[union-attr]
        mean = means.sum(0) / self.num_splits
        variance = stds.sum(0) / self.num_splits + ((means - mean) ** 2).sum(0) / self.num_splits
        self.bn.running_mean.data, self.bn.running_var.data = mean.detach(), variance.detach()  # type: ignore[union-attr]

    def forward(self, values):
        if self.training:
            n, c, t, h, w = values.shape
            values = values.view(n // self.num_splits, c * self.num_splits, t, h, w)
            values = self.split_bn(values).view(n, c, t, h, w)
        else:
            values = self.bn(values)
        return values * self.weight.view(-1, 1, 1, 1) + self.bias.view(-1, 1, 1, 1)


def sub_batch_net():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv3d(3, 4, 3, padding=1), SubBatchNorm3d(2, 4), nn.BatchNorm3d(4))
    disturb(model)
    return model


class TestSubBatchNorm:
    def test_is_in_training_mode_and_joins_its_statistics(self, notices):
        model = sub_batch_net()
        before = Snapshot(model)
        batches = draw((8, 8, 4), 3, 2, 4, 5)
        report = refresh_norm(model, batches, estimator="exact")
        with torch.no_grad():
            given = torch.cat([model[0](batch) for batch in batches]).double()
        found = model[1].bn
        torch.testing.assert_close(found.running_mean.double(), given.mean((0, 2, 3, 4)))
        torch.testing.assert_close(
            found.running_var.double(), given.var((0, 2, 3, 4), correction=0)
        )
        assert [(layer.name, layer.calls) for layer in report.layers] == [
            ("1.bn", 0),
            ("1.split_bn", 3),
            ("2", 3),
        ]
        assert report.kept == ()
        before.check(but=STATISTICS)
        assert "trying contiguous images: view size is not" in notices.text

    def test_leaves_out_what_does_not_divide(self, notices):
        report = refresh_norm(sub_batch_net(), draw((8, 7), 3, 2, 4, 5))
        assert (report.batches, report.skipped) == (1, 1)
        assert "left out 1 batches with a size that does not divide into" in notices.text

    def test_that_raises_when_it_joins_them_changes_nothing(self):
        model = sub_batch_net()
        model[1].aggregate_stats = explode
        before = Snapshot(model)
        with pytest.raises(Exception, match="raised ZeroDivisionError"):
            refresh_norm(model, draw((8, 8), 3, 2, 4, 5))
        before.check()


class Split(nn.BatchNorm2d):
    """As timm's `SplitBatchNorm2d`: the first part of a batch is its own, the rest another's."""

    def __init__(self, channels):
        super().__init__(channels)
        self.num_splits, self.other = 2, nn.BatchNorm2d(channels)

    def forward(self, values):
        if not self.training:
            return super().forward(values)
        one, two = values.chunk(2)
        return torch.cat([super().forward(one), self.other(two)])


@pytest.mark.parametrize("memory_format", ["auto", "contiguous"])
@pytest.mark.parametrize("estimator", ["paper", "torch", "exact"])
def test_a_layer_that_normalises_a_part_has_the_statistics_of_that_part(estimator, memory_format):
    model = nn.Sequential(nn.Conv2d(3, 3, 1), Split(3))
    batches = draw((8, 6, 4), 3, 5, 4)
    refresh_norm(model, batches, estimator=estimator, memory_format=memory_format)
    for layer, part in ((model[1], 0), (model[1].other, 1)):
        other = nn.Sequential(copy.deepcopy(model[0]), nn.BatchNorm2d(3))
        own = [batch.chunk(2)[part] for batch in batches]
        refresh_norm(other, own, estimator=estimator, memory_format=memory_format)
        assert isinstance(layer, nn.BatchNorm2d)
        assert_same_statistics(nn.Sequential(other[0], plain(layer)), other, 1e-6)


def plain(layer: nn.BatchNorm2d) -> nn.BatchNorm2d:
    found = nn.BatchNorm2d(layer.num_features)
    for name, buffer in layer.named_buffers(recurse=False):
        getattr(found, name).copy_(buffer)
    return found


@pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
def test_a_compiled_model_is_refreshed_as_it_is():
    """Compiled before, and by a backend that would not call hooks that come later."""
    model, other = make("conv2d"), make("conv2d")
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(data_for("conv2d")[0])
    model.load_state_dict(other.state_dict())
    report = refresh_norm(compiled, data_for("conv2d"))  # type: ignore[arg-type]
    refresh_norm(other, data_for("conv2d"))
    assert_same_statistics(model, other, 1e-12)
    assert [layer.name for layer in report.layers] == [f"_orig_mod.{n}" for n in ("1", "4", "7")]


class Fixed(nn.BatchNorm2d):
    """A subclass whose momentum is its own, as in copies of old code."""

    def forward(self, values):
        assert self.num_batches_tracked is not None
        self.num_batches_tracked.add_(1)
        return F.batch_norm(
            values * self.scale, self.running_mean, self.running_var, self.weight, self.bias,
            self.training, 0.1, self.eps,
        )  # fmt: skip

    scale = 10


class Ghost(nn.BatchNorm2d):
    def forward(self, values):
        return torch.cat([super(Ghost, self).forward(10 * part) for part in values.chunk(2)])


class Scheduled(nn.BatchNorm2d):
    @property
    def momentum(self):
        return 0.3

    @momentum.setter
    def momentum(self, value):
        pass

    def forward(self, values):
        return super().forward(10 * values)


class ChannelsLast(nn.BatchNorm1d):
    def forward(self, values):
        return super().forward(10 * values.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("estimator", ["paper", "exact"])
@pytest.mark.parametrize("kind", [Fixed, Ghost, Scheduled, ChannelsLast])
def test_what_the_kernel_normalises_counts_whatever_the_layer_does(kind, estimator):
    model = nn.Sequential(kind(3), nn.Identity())
    if kind is ChannelsLast:
        batches = [batch + torch.arange(3.0) for batch in draw((8, 8, 8, 6), 3, 3)]
        everything = torch.cat(batches).double() * 10
        axes: tuple[int, ...] = (0, 1)
    else:
        batches = draw((8, 8, 8, 6), 3, 5, 4)
        everything, axes = torch.cat(batches).double() * 10, (0, 2, 3)
    refresh_norm(model, batches, estimator=estimator)
    layer: Any = model[0]
    torch.testing.assert_close(
        layer.running_mean.double(), everything.mean(axes), rtol=1e-3, atol=0
    )
    if estimator == "exact":
        variance = everything.var(axes, correction=0)
        torch.testing.assert_close(layer.running_var.double(), variance, rtol=1e-4, atol=0)


def test_a_momentum_that_the_model_sets_anew_does_not_matter():
    model, other, seen = make("conv2d"), make("conv2d"), []

    def forward(model, batch):
        seen.append(batch)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.momentum = 0.1 / len(seen)
        return model(batch)

    refresh_norm(model, data_for("conv2d"), forward=forward)
    refresh_norm(other, data_for("conv2d"))
    assert_same_statistics(model, other, 1e-12)


class Masked(nn.BatchNorm1d):
    """Computes statistics itself: of what is not padding."""

    def forward(self, values, mask):  # type: ignore[override]
        shown = mask[:, None].float()
        if self.training:
            count = shown.sum()
            mean = (values * shown).sum((0, 2)) / count
            variance = ((values - mean[:, None]) ** 2 * shown).sum((0, 2)) / count
            with torch.no_grad():
                self.running_mean.lerp_(mean, self.momentum)  # type: ignore[union-attr, arg-type]
                self.running_var.lerp_(variance, self.momentum)  # type: ignore[union-attr, arg-type]
        else:
            mean, variance = self.running_mean, self.running_var
        return (values - mean[:, None]) / (variance[:, None] + self.eps).sqrt()


@pytest.mark.parametrize("estimator", ["paper", "torch"])
def test_a_layer_that_computes_statistics_itself_has_those(estimator):
    made = torch.Generator().manual_seed(0)
    batches = []
    for size in (8, 8, 6):
        mask = torch.arange(20)[None] < torch.randint(2, 20, (size, 1), generator=made)
        batches.append((torch.randn(size, 3, 20, generator=made) * 2 + 5, mask))
    model = Masked(3)
    disturb(model)
    refresh_norm(model, batches, forward=lambda model, batch: model(*batch), estimator=estimator)
    shown = [values.movedim(1, 2)[mask].double() for values, mask in batches]
    weights = torch.tensor([8.0, 8.0, 6.0] if estimator == "paper" else [1.0] * 3).double()
    for name, of in (
        ("running_mean", lambda one: one.mean(0)),
        ("running_var", lambda one: one.var(0, correction=0)),
    ):
        each = torch.stack([of(one) for one in shown])
        expected = (each * weights[:, None]).sum(0) / weights.sum()
        torch.testing.assert_close(getattr(model, name).double(), expected, rtol=1e-5, atol=1e-5)


class Own(Masked):
    """Has a momentum that cannot be set."""

    momentum = property(lambda _: 0.1, lambda *_: None)


class Renormalising(Masked):
    """Normalises with its old statistics in training too, as batch renormalisation does."""

    def forward(self, values, mask):  # type: ignore[override]
        assert self.running_mean is not None
        assert self.running_var is not None
        spread = self.running_var.sqrt()[:, None]
        place = self.running_mean.clone()[:, None]
        super().forward(values, mask)
        return (values - place) / spread


@pytest.mark.parametrize("kind", [Own, Renormalising])
def test_a_layer_that_mixes_old_statistics_with_new_ones_is_left_alone(kind):
    model = kind(3)
    disturb(model)
    before = Snapshot(model)
    batches = [(draw((8,), 3, 20)[0], torch.ones(8, 20, dtype=torch.bool)) for _ in range(3)]
    with pytest.raises(
        RefreshError, match=r"refreshed: '' \(mixes its statistics with the old ones"
    ):
        refresh_norm(model, batches, forward=lambda model, batch: model(*batch))
    before.check()


@pytest.mark.parametrize("kind", [Own, Renormalising])
def test_the_layers_behind_one_that_is_left_alone_see_it_in_eval_mode(kind):
    class Chain(nn.Module):
        def __init__(self):
            super().__init__()
            self.odd, self.plain = kind(3), nn.BatchNorm1d(3, momentum=None)

        def forward(self, values):
            mask = torch.ones(values.shape[0], values.shape[2], dtype=torch.bool)
            return self.plain(self.odd(values, mask))

    model = Chain()
    disturb(model)
    expected = copy.deepcopy(model)
    batches = draw((8, 8, 8), 3, 20)
    report = refresh_norm(model, batches)
    assert [each.name for each in report.stale] == ["odd"]
    expected.plain.reset_running_stats()
    expected.odd.eval()
    with torch.no_grad():
        for batch in batches:
            expected(batch)
    for name in STATISTICS:
        torch.testing.assert_close(getattr(model.plain, name), getattr(expected.plain, name))
    assert model.odd.training


class Sometimes(Masked):
    """Takes in no batch whose mean is above 1.5."""

    def forward(self, values, mask):  # type: ignore[override]
        return values if values.mean() > 1.5 else super().forward(values, mask)


def test_of_a_layer_without_a_kernel_the_calls_count_that_change_its_statistics():
    made = torch.Generator().manual_seed(0)
    mask = torch.ones(8, 20, dtype=torch.bool)
    batches = [(torch.randn(8, 3, 20, generator=made) + place, mask) for place in (0, 2, 1, 3)]
    model = Sometimes(3)
    disturb(model)
    report = refresh_norm(model, batches, forward=lambda model, batch: model(*batch))
    means = torch.stack([values.mean((0, 2)) for values, _ in batches])
    assert report.layers[0].calls == 2
    torch.testing.assert_close(model.running_mean, means[::2].mean(0), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("momentum", [0.3, None, np.float64(0.01)])
def test_the_momentum_is_put_back(momentum):
    model = make("conv2d")
    layers = [layer for layer in model.modules() if isinstance(layer, nn.BatchNorm2d)]
    for layer in layers:
        layer.momentum = momentum
    refresh_norm(model, data_for("conv2d"))
    assert [layer.momentum for layer in layers] == [momentum] * len(layers)


def test_copies_of_a_layer_that_a_forward_pass_makes_run_as_they_are():
    class Copying(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(3)

        def forward(self, values):
            copy.copy(self.norm).eval()(values)
            return self.norm(values)

    model, other = Copying(), nn.BatchNorm2d(3)
    refresh_norm(model, draw((8, 8), 3, 5, 4))
    refresh_norm(other, draw((8, 8), 3, 5, 4))
    assert_same_statistics(model.norm, other, 1e-6)


def test_layers_that_are_called_in_threads_are_refreshed_alike():
    class Threads(nn.Module):
        def __init__(self, plain):
            super().__init__()
            self.norms = nn.ModuleList(nn.BatchNorm2d(3) for _ in range(4))
            self.plain = plain

        def forward(self, values):
            calls = [lambda norm=norm: norm(values) for norm in self.norms]
            if self.plain:
                return [call() for call in calls]
            with ThreadPoolExecutor(4) as pool:
                return [each.result() for each in [pool.submit(call) for call in calls]]

    one, other = Threads(plain=False), Threads(plain=True)
    for model in (one, other):
        refresh_norm(model, draw((8, 8, 6), 3, 5, 4))
    assert_same_statistics(one, other, 1e-12)
    assert torch.overrides._get_current_function_mode_stack() == []


class Rigid(nn.BatchNorm2d):
    """Works with what it holds, whatever its mode."""

    def forward(self, values):
        return F.batch_norm(values, self.running_mean, self.running_var, training=False)


def test_a_layer_that_is_frozen_by_its_own_forward_is_left_alone(notices):
    model = nn.Sequential(nn.BatchNorm2d(3), Rigid(3), nn.BatchNorm2d(3))
    disturb(model)
    before = Snapshot(model)
    refresh_norm(model, draw((8, 8), 3, 5, 4), estimator="exact")
    before.check(but=[f"{number}.{name}" for number in (0, 2) for name in STATISTICS])
    assert "alone (works with its old statistics in training mode too): '1'" in notices.text
    other = copy.deepcopy(model).eval()
    other[0].train()
    with torch.no_grad():
        given = torch.cat([other[:2](batch) for batch in draw((8, 8), 3, 5, 4)]).double()
    mean = given.mean((0, 2, 3))
    torch.testing.assert_close(model[2].running_mean.double(), mean, rtol=1e-4, atol=1e-4)


def test_a_layer_that_is_first_called_in_a_later_batch_is_refreshed():
    class Now(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.rest, self.calls = nn.BatchNorm2d(3), Ghost(3), 0

        def forward(self, values):
            values = self.first(values)
            return self.rest(values) if len(values) == 6 else values

    model, batches = Now(), draw((8, 8, 6, 6), 3, 5, 4)
    report = refresh_norm(model, batches)
    assert [layer.calls for layer in report.layers] == [4, 2]
    assert model.rest.running_var is not None
    assert float(model.rest.running_var.min()) > 90  # of ten times what has variance 1


@pytest.mark.parametrize("are_views", [False, True])
@pytest.mark.parametrize("skip_layers", [[], ["0"], ["1"]])
def test_layers_that_share_their_statistics_are_an_error(are_views, skip_layers):
    model = nn.Sequential(nn.BatchNorm1d(5), nn.BatchNorm1d(5))
    for name in STATISTICS:
        shared = getattr(model[0], name)
        setattr(model[1], name, shared[...] if are_views else shared)
    before = Snapshot(model)
    with pytest.raises(RefreshError, match="layers '1' and '0' share running statistics"):
        refresh_norm(model, data_for("mlp"), skip_layers=skip_layers)
    before.check()


class Raising(nn.BatchNorm2d):
    def forward(self, values):
        super().forward(values)
        explode()


class Interrupted(nn.BatchNorm2d):
    def forward(self, values):
        super().forward(values)
        raise KeyboardInterrupt


@pytest.mark.parametrize(
    ("layer", "error"), [(Raising, UserCodeError), (Interrupted, KeyboardInterrupt)]
)
def test_torch_functions_are_heard_no_more_after_an_error_within_a_layer(layer, error):
    model = nn.Sequential(nn.BatchNorm2d(3), layer(3))
    before = Snapshot(model)
    with pytest.raises(error):
        refresh_norm(model, draw((8, 8), 3, 5, 4))
    assert torch.overrides._get_current_function_mode_stack() == []
    before.check()


class TestBuffers:
    @pytest.mark.parametrize("fails", [False, True])
    def test_that_the_model_writes_directly_come_back(self, fails):
        class Direct(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.other = nn.BatchNorm1d(5), nn.BatchNorm1d(5)
                self.count = 0

            def forward(self, values):
                self.count += 1
                if fails and self.count == 3:
                    explode()
                return self.norm.forward(self.other(values))

        model = Direct()
        disturb(model)
        before = Snapshot(model)
        if fails:
            with pytest.raises(UserCodeError):
                refresh_norm(model, data_for("mlp"))
        else:
            refresh_norm(model, data_for("mlp"))
        before.check(but=() if fails else [f"other.{name}" for name in STATISTICS])

    def test_that_come_up_in_the_pass_go_again(self):
        class Growing(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(5)
                self.register_buffer("cache", None)
                self.register_buffer("wide", torch.zeros(2))

            def forward(self, values):
                self.cache = values.clone()
                self.register_buffer("late", values[:1].clone())
                self.wide.data = torch.zeros(9)
                return self.norm(values)

        model = Growing()
        before = Snapshot(model)
        refresh_norm(model, data_for("mlp"))
        assert (model.cache, model.wide.shape) == (None, (2,))
        assert set(model.state_dict()) == {
            "wide",
            *(f"norm.{name}" for name in (*STATISTICS, "weight", "bias")),
        }
        before.check(but=STATISTICS)

    def test_that_are_sparse_are_let_be(self):
        class Graph(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(5)
                self.links: torch.Tensor
                self.register_buffer("links", torch.eye(16).to_sparse())

            def forward(self, values):
                return torch.sparse.mm(self.links, self.norm(values))

        assert refresh_norm(Graph(), data_for("mlp")[:3]).batches == 3

    def test_keep_their_storage_when_the_pass_fails(self):
        flat = torch.arange(5.0)
        model = nn.BatchNorm1d(5)
        model._buffers["running_mean"] = flat[:5]
        calls = iter(range(3))

        def forward(model, batch):
            model(batch)
            if next(calls) == 2:
                explode()

        with pytest.raises(UserCodeError):
            refresh_norm(model, data_for("mlp"), forward=forward)
        assert flat.tolist() == [0, 1, 2, 3, 4]
        assert model.running_mean.data_ptr() == flat.data_ptr()  # type: ignore[union-attr]

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_of_torchscript_parts_are_no_trouble(self):
        traced = torch.jit.trace(nn.Conv2d(3, 3, 1), torch.randn(1, 3, 4, 4))
        frozen = torch.jit.freeze(torch.jit.script(nn.Conv2d(3, 3, 1).eval()))
        model = nn.Sequential(nn.BatchNorm2d(3), traced, frozen, nn.BatchNorm2d(3))
        assert len(refresh_norm(model, draw((4, 4), 3, 4, 4)).layers) == 2


@pytest.mark.filterwarnings("ignore:.*")
def test_data_parallel_is_taken_off():
    model, other = make("conv2d"), make("conv2d")
    report = refresh_norm(nn.DataParallel(model), data_for("conv2d"))
    refresh_norm(other, data_for("conv2d"))
    assert_same_statistics(model, other, 1e-12)
    assert [layer.name for layer in report.layers] == ["1", "4", "7"]


def test_no_inputs_are_kept():
    """In the first batch all layers are; their inputs together are what a training keeps."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    class Counting(nn.Module):
        def forward(self, values):
            nonlocal most
            values = values + 1
            alive.append(weakref.ref(values))
            most = max(most, sum(one() is not None for one in alive))
            return values

    model = nn.Sequential(*(part for _ in range(20) for part in (Counting(), nn.BatchNorm2d(3))))
    refresh_norm(model, draw((4, 4), 3, 5, 5))
    assert most <= 4
