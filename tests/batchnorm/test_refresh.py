"""The refresh of a model in memory, against torch's own `update_bn` and closed forms."""

from __future__ import annotations

import copy
import itertools
from collections import OrderedDict, UserDict, namedtuple
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.distributed
from torch import nn
from torch.optim.swa_utils import update_bn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

from ckptavg.batchnorm.layers import KeptLayer
from ckptavg.batchnorm.refresh import RefreshReport, refresh_norm
from ckptavg.errors import RefreshError, UserCodeError
from ckptavg.model.batches import count_examples, default_forward, moved
from tests.helpers_norm import (
    MODELS,
    STATISTICS,
    Mlp,
    Renorm,
    Snapshot,
    assert_same_statistics,
    data_for,
    disturb,
    draw,
    explode,
    make,
    norms,
)

CPU = torch.device("cpu")


class _Affine(nn.Module):
    def forward(self, values):
        return values * 3 + 7


class TestAgainstUpdateBn:
    @pytest.mark.parametrize("sizes", [(16, 16, 16), (16, 16, 16, 5), (3, 9)], ids=str)
    @pytest.mark.parametrize("name", MODELS)
    def test_torch_in_contiguous_memory_is_the_same(self, name, sizes):
        model, other = make(name), make(name)
        data = [(images, torch.zeros(len(images))) for images in data_for(name, sizes)]
        update_bn(data, other)
        refresh_norm(model, data, estimator="torch", memory_format="contiguous")
        assert_same_statistics(model, other, 1e-5)

    @pytest.mark.parametrize("memory_format", ["channels_last", "auto"])
    @pytest.mark.parametrize("name", ["conv2d", "conv3d", "sync"])
    def test_torch_in_channels_last_is_nearly_the_same(self, name, memory_format):
        model, other = make(name), make(name)
        update_bn(data_for(name), other)
        refresh_norm(model, data_for(name), estimator="torch", memory_format=memory_format)
        assert_same_statistics(model, other, 1e-3)

    def test_paper_is_too_where_all_batches_are_equal(self):
        model, other = make("conv2d"), make("conv2d")
        update_bn(data_for("conv2d", (8, 8, 8)), other)
        refresh_norm(model, data_for("conv2d", (8, 8, 8)), memory_format="contiguous")
        assert_same_statistics(model, other, 1e-5)

    def test_paper_is_not_where_they_are_not(self):
        model, other = make("conv2d"), make("conv2d")
        update_bn(data_for("conv2d"), other)
        refresh_norm(model, data_for("conv2d"), memory_format="contiguous")
        with pytest.raises(AssertionError):
            assert_same_statistics(model, other, 1e-4)

    @pytest.mark.parametrize("momentum", [None, 0.0, 0.1, 1.0])
    def test_the_layers_own_momentum_does_not_matter(self, momentum):
        model, other = make("mlp"), make("mlp")
        for layer in norms(model) + norms(other):
            layer.momentum = momentum
        update_bn(data_for("mlp"), other)
        refresh_norm(model, data_for("mlp"), estimator="torch")
        assert_same_statistics(model, other, 1e-5)
        assert {layer.momentum for layer in norms(model)} == {momentum}

    @pytest.mark.parametrize("estimator", ["torch", "paper"])
    def test_full_with_dropout_is_the_same_under_the_same_seed(self, estimator):
        def with_dropout():
            return nn.Sequential(nn.Linear(5, 8), nn.Dropout(0.3), make("mlp")[1], nn.Dropout())

        torch.manual_seed(3)
        model = with_dropout()
        other, data = copy.deepcopy(model), data_for("mlp", (16, 16))
        torch.manual_seed(7)
        update_bn(data, other)
        torch.manual_seed(7)
        refresh_norm(model, data, estimator=estimator, train_mode="full")
        assert_same_statistics(model, other, 1e-5)
        refresh_norm(model, data, estimator=estimator)
        with pytest.raises(AssertionError):
            assert_same_statistics(model, other, 1e-2)

    def test_a_layer_that_is_called_twice_counts_twice(self):
        class Twice(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(5)

            def forward(self, values):
                return self.norm(3 * self.norm(values) + 7)

        model, other = Twice(), Twice()
        update_bn(data_for("mlp"), other)
        report = refresh_norm(model, data_for("mlp"), estimator="torch")
        assert_same_statistics(model, other, 1e-5)
        assert report.layers[0].calls == model.norm.num_batches_tracked == 8
        assert (report.batches, report.samples) == (4, 53)

    def test_a_layer_in_float64_does_so_too(self):
        """Its buffers are in the precision of the estimate, and must not become part of it."""
        model = nn.BatchNorm1d(5).double()
        other, data = copy.deepcopy(model), [batch.double() for batch in data_for("mlp")]

        def forward(model, batch):
            return model(model(batch) * 3 + 7)

        update_bn(data, nn.Sequential(other, _Affine(), other))
        refresh_norm(model, data, estimator="torch", forward=forward)
        assert_same_statistics(model, other, 1e-12)

    def test_a_layer_under_two_names_is_one(self):
        def shared():
            torch.manual_seed(0)
            norm = nn.BatchNorm1d(5)
            return nn.ModuleDict({"one": norm, "two": norm, "last": nn.Linear(5, 5)})

        def forward(model, batch):
            return model["last"](model["two"](model["one"](batch) * 2 + 1))

        model, data = shared(), data_for("mlp")
        report = refresh_norm(model, data, estimator="torch", forward=forward)
        assert [(layer.name, layer.calls) for layer in report.layers] == [("one", 8)]
        assert report.kept == ()
        assert model["two"].running_mean is model["one"].running_mean


class TestPaper:
    @pytest.mark.parametrize("name", MODELS)
    def test_is_a_pass_with_momentum_b_over_n_plus_b(self, name):
        """The authors' own loop: https://github.com/timgaripov/swa/blob/master/utils.py."""
        model, other = make(name), make(name)
        seen = 0
        other.train()
        for layer in norms(other):
            layer.reset_running_stats()
        for batch in data_for(name):
            for layer in norms(other):
                layer.momentum = len(batch) / (seen + len(batch))
            with torch.no_grad():
                other(batch)
            seen += len(batch)
        refresh_norm(model, data_for(name), memory_format="contiguous")
        assert_same_statistics(model, other, 1e-5)


class TestExact:
    @pytest.mark.parametrize("split", [(40,), (20, 20), (37, 3), (2,) * 20, (5, 30, 2, 3)], ids=str)
    @pytest.mark.parametrize("shape", [(3,), (3, 4), (3, 4, 5), (3, 4, 5, 2)], ids=str)
    def test_is_the_population_however_it_is_batched(self, shape, split):
        """In float64 at a mean of 10,000 standard deviations, which float32 could not hold."""
        [data] = draw((40,), *shape, mean=1e4, std=1)
        kind = {1: nn.BatchNorm1d, 2: nn.BatchNorm1d, 3: nn.BatchNorm2d, 4: nn.BatchNorm3d}
        model: Any = kind[len(shape)](3).double()
        axes = [axis for axis in range(data.dim()) if axis != 1]
        mean = data.double().mean(axes)
        variance = data.double().var(axes, correction=0)

        def forward(model, batch):
            return model(batch.double())

        refresh_norm(model, data.split(split), estimator="exact", forward=forward)
        assert ((model.running_mean - mean).abs() <= 1e-4 * variance.sqrt()).all()
        torch.testing.assert_close(model.running_var, variance, rtol=1e-9, atol=0)
        assert model.num_batches_tracked == len(split)

        stored: Any = kind[len(shape)](3)
        refresh_norm(stored, (data - 1e4).split(split), estimator="exact")
        centred = (data - 1e4).double()
        torch.testing.assert_close(
            stored.running_mean.double(), centred.mean(axes), rtol=0, atol=1e-6
        )
        torch.testing.assert_close(
            stored.running_var.double(), centred.var(axes, correction=0), rtol=1e-5, atol=0
        )

    def test_a_convolution_may_have_batches_of_one(self):
        [data] = draw((12,), 3, 4, 5, mean=1e4, std=1)
        model: Any = nn.BatchNorm2d(3)
        report = refresh_norm(model, data.split(1), estimator="exact")
        assert torch.equal(model.running_mean, data.double().mean((0, 2, 3)).float())
        assert (report.batches, report.skipped) == (12, 0)

    def test_counts_both_calls_of_a_layer(self):
        data = data_for("mlp")
        model: Any = nn.BatchNorm1d(5)
        refresh_norm(
            model, data, estimator="exact", forward=lambda model, batch: model(model(batch) * 0 + 9)
        )
        everything = torch.cat([*data, *(torch.full_like(batch, 9) for batch in data)]).double()
        torch.testing.assert_close(model.running_mean.double(), everything.mean(0))
        torch.testing.assert_close(model.running_var.double(), everything.var(0, correction=0))


class TestOneValuePerChannel:
    @pytest.mark.parametrize("estimator", ["torch", "paper", "exact"])
    def test_such_a_batch_is_left_out(self, estimator, notices):
        model, other = make("mlp"), make("mlp")
        report = refresh_norm(model, data_for("mlp", (16, 16, 1)), estimator=estimator)
        assert "left out 1 batches with fewer than two values per channel" in notices.text
        refresh_norm(other, data_for("mlp", (16, 16)), estimator=estimator)
        assert_same_statistics(model, other, 1e-12)
        assert (report.batches, report.samples, report.skipped) == (2, 32, 1)
        assert report.layers[0].calls == 2

    def test_one_image_is_many_values(self, notices):
        model, other = make("conv2d"), make("conv2d")
        update_bn(data_for("conv2d", (8, 1)), other)
        report = refresh_norm(
            model, data_for("conv2d", (8, 1)), estimator="torch", memory_format="contiguous"
        )
        assert_same_statistics(model, other, 1e-5)
        assert (report.batches, report.samples, report.skipped) == (2, 9, 0)
        assert notices.text == ""

    def test_layers_before_the_one_that_refuses_do_not_count_either(self):
        """A conv layer sees many values, the head after the pooling only one."""

        def pooled():
            torch.manual_seed(0)
            head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(4))
            return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), *head)

        model, other = pooled(), pooled()
        refresh_norm(model, data_for("conv2d", (8, 1, 8)))
        refresh_norm(other, [data_for("conv2d", (8, 1, 8))[index] for index in (0, 2)])
        assert_same_statistics(model, other, 1e-12)

    def test_nor_does_a_layer_without_statistics_get_it(self):
        model = nn.Sequential(
            nn.BatchNorm2d(3), nn.Flatten(), nn.BatchNorm1d(12, track_running_stats=False)
        )
        report = refresh_norm(model, draw((4, 1, 4), 3, 2, 2))
        assert (report.batches, report.skipped) == (2, 1)

    @pytest.mark.parametrize("estimator", ["torch", "paper", "exact"])
    def test_nothing_of_it_is_left_in_them_not_even_nan(self, estimator):
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3))
        model, other = nn.BatchNorm2d(3), nn.BatchNorm2d(3)
        first, bad, last = draw((8, 1, 8), 3, 4, 4)
        bad[:] = torch.nan
        refresh_norm(nn.Sequential(model, *head), [first, bad, last], estimator=estimator)
        refresh_norm(nn.Sequential(other, *head), [first, last], estimator=estimator)
        assert_same_statistics(model, other, 1e-12)

    def test_nothing_of_it_is_left_for_batches_that_come_later(self):
        head = (nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.BatchNorm1d(3))
        model = nn.Sequential(nn.BatchNorm2d(3), *head)
        data = draw((8, 8, 1, 8, 8, 8), 3, 4, 4)
        data[2][:] = torch.nan
        report = refresh_norm(model, data, strict=True)
        assert (report.batches, report.skipped, report.nonfinite) == (5, 1, 0)

    def test_nothing_but_such_batches_is_an_error(self):
        model = make("mlp")
        before = Snapshot(model)
        with pytest.raises(RefreshError, match=r"no batch could be used.*larger"):
            refresh_norm(model, data_for("mlp", (1, 1)))
        before.check()

    def test_an_endless_loader_of_such_batches_comes_to_an_end(self):
        batches = itertools.repeat(torch.zeros(1, 5), 1000)
        with pytest.raises(RefreshError, match="no batch could be used"):
            refresh_norm(make("mlp"), batches, max_samples=10)
        assert len(list(batches)) == 990

    def test_an_empty_batch_is_left_out_too(self):
        report = refresh_norm(make("mlp"), [*data_for("mlp", (8,)), torch.zeros(0, 5)])
        assert (report.batches, report.skipped) == (1, 1)


class TestNotANumber:
    @pytest.mark.parametrize("old", [torch.nan, torch.inf, -torch.inf, 1e30])
    @pytest.mark.parametrize("estimator", ["torch", "paper", "exact"])
    def test_in_the_old_buffers_does_not_survive(self, estimator, old):
        model, other = make("mlp"), make("mlp")
        for layer in norms(model):
            layer.running_mean.fill_(old)
            layer.running_var.fill_(old)
        report = refresh_norm(model, data_for("mlp"), estimator=estimator)
        refresh_norm(other, data_for("mlp"), estimator=estimator)
        assert_same_statistics(model, other, 1e-12)
        changes = [(layer.mean_change, layer.variance_ratio) for layer in report.layers]
        assert not torch.tensor(changes).isnan().any()

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
    @pytest.mark.parametrize("estimator", ["torch", "paper", "exact"])
    @pytest.mark.parametrize("name", ["mlp", "conv2d"])
    def test_in_the_data_leaves_that_batch_out(self, name, estimator, bad, notices):
        model, other = nn.Sequential(make(name)), nn.Sequential(make(name))
        data = data_for(name)
        data[1].flatten()[7] = bad
        report = refresh_norm(model, data, estimator=estimator)
        refresh_norm(other, [*data[:1], *data[2:]], estimator=estimator)
        assert_same_statistics(model, other, 1e-12)
        assert (report.batches, report.samples, report.nonfinite) == (3, 37, 1)
        assert "left out 1 batches for NaN or Inf, first in layer '0.1': number 1" in notices.text

    @pytest.mark.parametrize("bad", [torch.nan, torch.inf, 3e38])
    @pytest.mark.parametrize("estimator", ["torch", "paper", "exact"])
    @pytest.mark.parametrize("name", ["mlp", "conv2d"])
    def test_in_the_data_is_an_error_that_names_the_layer_if_strict(self, name, estimator, bad):
        model = nn.Sequential(nn.Identity(), make(name))
        before = Snapshot(model)
        data = data_for(name)
        data[1].flatten()[7] = bad
        with pytest.raises(RefreshError, match=r"batch number 1: .* layer '1\.1' are NaN"):
            refresh_norm(model, data, estimator=estimator, strict=True)
        before.check()

    @pytest.mark.parametrize("estimator", ["torch", "exact"])
    def test_in_all_of_the_data_is_an_error_too(self, estimator):
        model = make("conv2d")
        before = Snapshot(model)
        data = [batch * torch.nan for batch in data_for("conv2d")]
        with pytest.raises(RefreshError, match=r"no batch could be used: .* layer '1' are NaN"):
            refresh_norm(model, data, estimator=estimator)
        before.check()

    def test_in_a_later_layer_alone_is_found_too(self):
        class Overflowing(nn.Module):
            def __init__(self):
                super().__init__()
                self.first, self.last = nn.BatchNorm1d(5), nn.BatchNorm1d(5)

            def forward(self, values):
                return self.last(self.first(values) + torch.log(values[:, :1].sum() * 0 + 1 - bad))

        bad = 0.0
        data = data_for("mlp")
        model, other = Overflowing(), Overflowing()

        def forward(model, batch):
            nonlocal bad
            bad = float(batch is data[2]) * 2
            return model(batch)

        report = refresh_norm(model, data, forward=forward)
        assert report.nonfinite == 1
        refresh_norm(other, [*data[:2], data[3]])
        assert_same_statistics(model, other, 1e-12)

    def test_too_large_for_the_buffers_is_an_error(self):
        model: Any = nn.BatchNorm1d(5).half()
        before = Snapshot(model)
        data = [(batch * 400).half() for batch in data_for("mlp")]
        with pytest.raises(RefreshError, match=r"layer '' are too large for torch\.float16"):
            refresh_norm(model, data)
        before.check()


class Exploding(nn.Module):
    """Raises in its second forward pass, after a norm layer has seen the batch."""

    def __init__(self, error=ZeroDivisionError):
        super().__init__()
        self.first, self.second = make("mlp"), make("mlp", seed=1)
        self.last = nn.BatchNorm1d(2)
        self.counter: torch.Tensor
        self.register_buffer("counter", torch.zeros(3))
        self.error, self.left = error, 1

    def forward(self, values):
        found = self.last(self.first(values))
        self.counter += 1
        if not self.left:
            raise self.error("on purpose")
        self.left -= 1
        return found


def mixed(model):
    """Flags, momenta and buffers as no `train()` or `eval()` would leave them."""
    model.train()
    for index, module in enumerate(model.modules()):
        module.training = index % 3 == 0
    for index, layer in enumerate(norms(model)):
        layer.momentum = (None, 0.0, 0.3)[index % 3]
    norms(model)[0].running_mean[0] = torch.nan
    return model


class BadLoader:
    def __init__(self, where):
        self.where = where

    def __iter__(self):
        if self.where == "iter":
            explode()
        yield data_for("mlp")[0]
        explode()


class Immovable:
    def to(self, _):
        explode()


def bad_hook(*_):
    explode()


@pytest.mark.parametrize("train_mode", ["norm", "full"])
@pytest.mark.parametrize("estimator", ["paper", "exact"])
class TestExceptions:
    def refresh(self, model, batches, error=ZeroDivisionError, **options):
        before = Snapshot(mixed(model))
        with pytest.raises(UserCodeError, match=f"raised {error.__name__}: on purpose") as caught:
            refresh_norm(model, batches, **options)
        assert isinstance(caught.value.__cause__, error)
        before.check()
        assert all(
            not layer._forward_hooks and not layer._forward_pre_hooks for layer in norms(model)
        )

    @pytest.mark.parametrize("error", [ZeroDivisionError, StopIteration, RuntimeError])
    def test_of_the_model(self, error, estimator, train_mode):
        options = {"estimator": estimator, "train_mode": train_mode}
        self.refresh(Exploding(error), data_for("mlp"), error, **options)

    @pytest.mark.parametrize("where", ["iter", "next"])
    def test_of_the_loader(self, where, estimator, train_mode):
        options = {"estimator": estimator, "train_mode": train_mode}
        self.refresh(make("mlp"), BadLoader(where), **options)

    def test_of_the_forward_function(self, estimator, train_mode):
        def forward(model, batch):
            model(batch)
            explode()

        options = {"estimator": estimator, "train_mode": train_mode}
        self.refresh(make("mlp"), data_for("mlp"), forward=forward, **options)

    def test_of_moving_a_batch(self, estimator, train_mode):
        options = {"estimator": estimator, "train_mode": train_mode}
        self.refresh(make("mlp"), [data_for("mlp")[0], Immovable()], **options)

    def test_of_a_hook(self, estimator, train_mode):
        options = {"estimator": estimator, "train_mode": train_mode}
        model = make("mlp")
        handle = model[3].register_forward_hook(bad_hook)
        before = Snapshot(mixed(model))
        with pytest.raises(UserCodeError) as caught:
            refresh_norm(model, data_for("mlp"), **options)
        assert isinstance(caught.value.__cause__, ZeroDivisionError)
        before.check()
        assert list(model[3]._forward_hooks) == [handle.id]

    def test_of_a_hook_on_the_norm_layer(self, estimator, train_mode):
        model = make("mlp")
        model[1].register_forward_pre_hook(bad_hook)
        before = Snapshot(mixed(model))
        with pytest.raises(UserCodeError):
            refresh_norm(model, data_for("mlp"), estimator=estimator, train_mode=train_mode)
        before.check()

    @pytest.mark.parametrize("error", [KeyboardInterrupt, GeneratorExit])
    def test_that_are_nobodys_fault_pass(self, error, estimator, train_mode):
        model = Exploding(error)
        before = Snapshot(mixed(model))
        with pytest.raises(error):
            refresh_norm(model, data_for("mlp"), estimator=estimator, train_mode=train_mode)
        before.check()

    def test_of_the_progress_bar_pass(self, estimator, train_mode):
        model = make("mlp")
        before = Snapshot(mixed(model))
        with pytest.raises(ZeroDivisionError):
            refresh_norm(
                model,
                data_for("mlp"),
                estimator=estimator,
                train_mode=train_mode,
                progress=lambda *_: explode(),
            )
        before.check()


class TestNothingElseChanges:
    @pytest.mark.parametrize("train_mode", ["norm", "full"])
    @pytest.mark.parametrize("name", MODELS)
    def test_but_the_statistics(self, name, train_mode):
        model = mixed(make(name))
        before = Snapshot(model)
        refresh_norm(model, data_for(name), train_mode=train_mode)
        before.check(but=STATISTICS)

    def test_not_even_other_buffers_that_move_in_training_mode(self):
        model = nn.Sequential(nn.BatchNorm1d(3), Renorm(3), nn.BatchNorm1d(3))
        before = Snapshot(model)
        refresh_norm(model, draw((4, 4), 3, 6), train_mode="full", skip_layers=["2"])
        before.check(but=["0." + name for name in STATISTICS])

    @pytest.mark.parametrize("fails", [False, True])
    def test_nor_passing_ones_nor_the_numbers_beside_them(self, fails):
        """A cache that has grown, and its length."""

        class Caching(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm, self.length, self.calls = nn.BatchNorm1d(5), 0, 0
                self.table: torch.Tensor
                self.register_buffer("table", torch.zeros(0), persistent=False)

            def forward(self, values):
                self.calls += 1
                if fails and self.calls == 3:
                    explode()
                if len(values) > self.length:
                    self.length = len(values)
                    self.register_buffer("table", torch.arange(self.length), persistent=False)
                return self.norm(values + self.table[: len(values), None] * 0)

        model = Caching()
        before = Snapshot(model)
        if fails:
            with pytest.raises(UserCodeError):
                refresh_norm(model, data_for("mlp"))
        else:
            refresh_norm(model, data_for("mlp"))
        before.check(but=() if fails else STATISTICS)
        assert (model.length, model.calls) == (0, 0)
        model(data_for("mlp")[0])

    @pytest.mark.parametrize("replaced", [False, True])
    def test_nor_those_that_the_model_itself_writes(self, replaced):
        class Counting(nn.Module):
            def __init__(self):
                super().__init__()
                self.norm = nn.BatchNorm1d(5)
                self.count: torch.Tensor
                self.register_buffer("count", torch.zeros(1))

            def forward(self, values):
                if replaced:
                    self.count = self.count + 1
                else:
                    self.count += 1
                return self.norm(values)

        model = Counting()
        before = Snapshot(model)
        refresh_norm(model, data_for("mlp"))
        before.check(but=STATISTICS)

    def test_requires_grad_stays_and_no_graph_is_kept(self):
        model = make("mlp")
        model[0].requires_grad_(False)
        flags = [value.requires_grad for value in model.parameters()]
        data = [batch.requires_grad_() for batch in data_for("mlp")]
        kept = []

        def forward(model, batch):
            kept.append(model(batch))

        refresh_norm(model, data, forward=forward)
        assert [value.requires_grad for value in model.parameters()] == flags
        assert not any(found.requires_grad for found in kept)

    def test_the_model_still_trains_afterwards(self):
        model = make("mlp").train()
        refresh_norm(model, data_for("mlp"))
        mean = norms(model)[0].running_mean.clone()
        model(data_for("mlp")[0]).sum().backward()
        assert model[0].weight.grad is not None
        assert not torch.equal(norms(model)[0].running_mean, mean)
        assert norms(model)[0].num_batches_tracked == 5

    @pytest.mark.parametrize("estimator", ["paper", "torch", "exact"])
    def test_a_second_pass_gives_the_same_bits(self, estimator):
        model = make("conv2d")
        refresh_norm(model, data_for("conv2d"), estimator=estimator)
        before = Snapshot(model)
        report = refresh_norm(model, data_for("conv2d"), estimator=estimator)
        before.check()
        assert max(layer.mean_change for layer in report.layers) < 1e-6
        assert max(layer.variance_ratio for layer in report.layers) < 1 + 1e-6


class TestModes:
    def test_dropout_rests(self):
        model = nn.Sequential(nn.Dropout(0.5), make("mlp")).train()
        other = copy.deepcopy(model)
        torch.manual_seed(1)
        refresh_norm(model, data_for("mlp"))
        torch.manual_seed(2)
        refresh_norm(other, data_for("mlp"))
        assert_same_statistics(model, other, 1e-12)
        refresh_norm(other[1], data_for("mlp"))
        assert_same_statistics(model, other, 1e-12)

    def test_the_norm_layers_are_in_training_mode_and_nothing_else(self):
        model = make("mlp").train()
        seen = []

        def forward(model, batch):
            seen.append({type(module) for module in model.modules() if module.training})
            model(batch)

        refresh_norm(model, data_for("mlp"), forward=forward)
        assert seen == [{nn.BatchNorm1d}] * 4
        seen.clear()
        refresh_norm(model.eval(), data_for("mlp"), forward=forward, train_mode="full")
        assert seen == [{Mlp, nn.Linear, nn.ReLU, nn.BatchNorm1d}] * 4

    def test_a_train_method_that_raises_is_asked_for_by_full_alone(self, notices):
        class Stubborn(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = make("mlp")

            def train(self, mode=True):  # noqa: FBT002 - as in torch
                super().train(mode)
                explode()

            def forward(self, values):
                return self.body(values)

        model, other = Stubborn(), make("mlp")
        for part in model.modules():
            part.training = False
        before = Snapshot(model)
        with pytest.raises(UserCodeError, match=r"train\(\) raised ZeroDivisionError"):
            refresh_norm(model, data_for("mlp"), train_mode="full")
        before.check()
        refresh_norm(model, data_for("mlp"))
        assert "its train() raised ZeroDivisionError" in notices.text
        refresh_norm(other, data_for("mlp"))
        assert_same_statistics(model, other, 1e-12)
        before.check(but=STATISTICS)

    @pytest.mark.parametrize("train_mode", ["norm", "full"])
    def test_what_a_train_method_changes_is_put_back(self, train_mode):
        """Weights that are merged in eval mode, as those of LoRA, and whether they are trained."""

        class Merging(nn.Module):
            def __init__(self):
                super().__init__()
                self.body, self.is_merged = make("mlp"), False
                self.extra = nn.Parameter(torch.ones(()))

            def train(self, mode=True):  # noqa: FBT002 - as in torch
                super().train(mode)
                self.body[0].weight.requires_grad_(mode)
                if mode == self.is_merged:
                    self.body[0].weight.data += -self.extra.data if mode else self.extra.data
                    self.is_merged = not mode
                return self

            def forward(self, values):
                return self.body(values)

        model = Merging().eval()
        before = Snapshot(model)
        refresh_norm(model, data_for("mlp"), train_mode=train_mode)
        before.check(but=STATISTICS)
        assert model.is_merged

    def test_a_method_of_the_name_train_that_is_another_is_not_called(self, notices):
        """As that of ultralytics, which runs a training."""

        class Trainer(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = make("mlp")

            def train(self, trainer=None, **options):  # type: ignore[override]  # noqa: ARG002
                explode()

            def forward(self, values):
                return self.body(values)

        assert len(refresh_norm(Trainer(), data_for("mlp")).layers) == 2
        assert notices.text == ""

    def test_layers_that_the_forward_pass_puts_in_eval_mode_are_left(self):
        class Fixed(nn.Module):
            def __init__(self):
                super().__init__()
                self.backbone, self.head = nn.BatchNorm1d(5), nn.BatchNorm1d(5)

            def forward(self, values):
                self.backbone.eval()
                return self.head(self.backbone(values))

        model = Fixed()
        disturb(model)
        before = Snapshot(model)
        report = refresh_norm(model, data_for("mlp"), estimator="exact")
        before.check(but=[f"head.{name}" for name in STATISTICS])
        assert [(each.name, each.is_intended) for each in report.kept] == [("backbone", True)]
        given = model.backbone.eval()(torch.cat(data_for("mlp")))
        torch.testing.assert_close(model.head.running_mean, given.mean(0), rtol=1e-4, atol=1e-4)

    @pytest.mark.parametrize("train_mode", ["norm", "full"])
    def test_the_mode_of_train_may_have_another_name(self, train_mode):
        class Frozen(nn.Sequential):
            def train(self, is_training=True):  # noqa: FBT002
                super().train(is_training)
                self[0].eval()
                return self

        model = Frozen(nn.BatchNorm1d(5), nn.BatchNorm1d(5))
        disturb(model)
        before = Snapshot(model)
        report = refresh_norm(model, draw((16, 16, 16), 5), train_mode=train_mode)
        before.check(but=[f"1.{name}" for name in STATISTICS])
        assert [(each.name, each.is_intended) for each in report.kept] == [("0", True)]

    @pytest.mark.parametrize("train_mode", ["norm", "full"])
    @pytest.mark.parametrize(
        "replacement",
        [
            None,
            lambda mode=True: mode,
            lambda self, mode=True: (self, mode),  # `disabled_train` of latent diffusion
            lambda *_: None,
        ],
    )
    def test_layers_that_the_models_train_keeps_in_eval_mode_are_left(
        self, replacement, train_mode, notices
    ):
        """Mmdetection's `norm_eval`, or the `model.train = disabled_train` of diffusion models."""

        class Partly(nn.Module):
            def __init__(self):
                super().__init__()
                self.backbone = nn.Sequential(nn.Linear(5, 6), nn.BatchNorm1d(6))
                self.head = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4))

            def train(self, *args, **keywords):
                super().train(*args, **keywords)
                if replacement is None:
                    self.backbone.eval()
                return self

            def forward(self, values):
                return self.head(self.backbone(values))

        model: Any = Partly()
        disturb(model)
        if replacement is not None:
            model.backbone.eval()
            model.backbone.train = replacement
        expected = copy.deepcopy(model)
        before, batches = Snapshot(model), draw((16, 16, 16), 5)
        report = refresh_norm(model, batches, train_mode=train_mode)
        before.check(but=[f"head.1.{name}" for name in STATISTICS])
        assert [(each.name, each.is_intended) for each in report.kept] == [("backbone.1", True)]
        reason = "kept in eval mode by the model's own train()"
        assert f"left 1 norm layer alone ({reason}): 'backbone.1'" in notices.text
        assert report.state == "refreshed"
        expected.backbone.eval()
        with torch.no_grad():
            update_bn([expected.backbone(batch) for batch in batches], expected.head)
        for name in ("running_mean", "running_var"):
            torch.testing.assert_close(
                getattr(model.head[1], name), getattr(expected.head[1], name)
            )
        report = refresh_norm(model, batches, layers=["1"])
        assert [each.name for each in report.layers] == ["backbone.1", "head.1"]


class FrozenBatchNorm(nn.BatchNorm1d):
    """As detection models have it."""


class TestLayers:
    def test_one_that_is_never_called_keeps_what_it_had(self, notices):
        used = nn.BatchNorm1d(5)
        model = nn.ModuleDict({"used": used, "idle\n": nn.BatchNorm1d(5)})
        disturb(model)
        before = Snapshot(model)
        report = refresh_norm(model, data_for("mlp"), forward=lambda _, batch: used(batch))
        before.check(but=["used." + name for name in STATISTICS])
        assert report.kept == (KeptLayer("idle\n", "not called", is_intended=False),)
        assert report.state == "partly refreshed"
        assert [layer.name for layer in report.layers] == ["used"]
        assert "left 1 norm layer alone (not called): 'idle\\n'" in notices.text

    def test_none_of_them_called_is_an_error(self):
        model = make("mlp")
        before = Snapshot(model)
        with pytest.raises(RefreshError, match=r"refreshed: '1', '4' \(not called\)"):
            refresh_norm(model, data_for("mlp"), forward=lambda *_: None)
        before.check()

    def test_none_left_but_frozen_ones_is_none_to_refresh(self):
        model = nn.Sequential(nn.Linear(5, 5), FrozenBatchNorm(5))
        report = refresh_norm(model, data_for("mlp"))
        assert report.layers == ()
        assert [each.is_intended for each in report.kept] == [True]

    @pytest.mark.filterwarnings("ignore:.*torch.jit:DeprecationWarning")
    def test_of_torchscript_are_named(self):
        model = torch.jit.script(nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5)))
        with pytest.raises(RefreshError, match=r"'1' \(BatchNorm1d in TorchScript is of a kind"):
            refresh_norm(model, data_for("mlp"))

    def test_one_without_statistics_is_none(self):
        model = nn.Sequential(
            nn.BatchNorm1d(5), nn.Linear(5, 4), nn.BatchNorm1d(4, track_running_stats=False)
        )
        before = Snapshot(model)
        report = refresh_norm(model, data_for("mlp"))
        assert [layer.name for layer in report.layers] == ["0"]
        before.check(but=STATISTICS)

    @pytest.mark.parametrize("train_mode", ["norm", "full"])
    def test_one_that_was_told_to_keep_its_statistics_keeps_them(self, train_mode):
        frozen = nn.BatchNorm1d(5)
        frozen.track_running_stats = False
        model = nn.Sequential(nn.BatchNorm1d(5), frozen)
        before = Snapshot(model)
        report = refresh_norm(model, data_for("mlp"), train_mode=train_mode)
        assert [layer.name for layer in report.layers] == ["0"]
        before.check(but=["0." + name for name in STATISTICS])

    @pytest.mark.parametrize(
        "model",
        [nn.Linear(5, 2), nn.BatchNorm1d(5, track_running_stats=False), nn.LayerNorm(5)],
        ids=lambda model: type(model).__name__,
    )
    def test_a_model_without_any_does_not_touch_the_loader(self, model):
        before = Snapshot(model)
        report = refresh_norm(model, BadLoader("iter"))
        assert report == RefreshReport("paper", 0, 0, 0, (), ())
        before.check()

    def test_a_layer_may_be_called_by_keyword(self):
        class Named(nn.Module):
            def __init__(self):
                super().__init__()
                self.body = make("mlp")

            def forward(self, values):
                values = self.body[1](input=self.body[0](values))
                return self.body[4](input=self.body[3](self.body[2](values)))

        model, other = Named(), make("mlp")
        report = refresh_norm(model, [*data_for("mlp"), torch.zeros(1, 5)], estimator="torch")
        update_bn(data_for("mlp"), other)
        assert_same_statistics(model, other, 1e-5)
        assert report.skipped == 1

    def test_a_hook_that_changes_the_input_is_heeded(self):
        model, other = make("mlp"), make("mlp")
        for one in (model, other):
            one[1].register_forward_pre_hook(lambda _, args: (args[0] * 3 + 1,))
        refresh_norm(model, data_for("mlp"), estimator="exact")
        refresh_norm(other, data_for("mlp", (53,)), estimator="exact")
        [everything] = data_for("mlp", (53,))
        expected = (model[0](torch.cat(data_for("mlp"))) * 3 + 1).double()
        torch.testing.assert_close(model[1].running_mean.double(), expected.mean(0))
        assert everything.shape == (53, 5)

    @pytest.mark.filterwarnings("ignore:Lazy modules")
    def test_a_lazy_one_that_has_its_weights_works(self):
        def lazy():
            return nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d(), nn.Flatten())

        model, other = lazy(), make("conv2d")[:2]
        model.load_state_dict(other.state_dict())
        refresh_norm(model, data_for("conv2d"), estimator="torch", memory_format="contiguous")
        update_bn(data_for("conv2d"), other)
        assert_same_statistics(model, other, 1e-5)
        assert not model[1]._forward_pre_hooks

    @pytest.mark.filterwarnings("ignore:Lazy modules")
    def test_a_lazy_one_that_never_ran_is_an_error(self):
        model = nn.Sequential(nn.LazyConv2d(8, 3), nn.LazyBatchNorm2d())
        with pytest.raises(RefreshError, match=r"layer '1' is lazy and has no shape yet; .*run it"):
            refresh_norm(model, data_for("conv2d"))
        assert not model[1]._forward_hooks

    @pytest.mark.parametrize("estimator", ["torch", "paper", "exact"])
    @pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
    def test_buffers_of_16_bits_hold_the_rounded_statistics(self, dtype, estimator):
        model: Any = nn.BatchNorm2d(3).to(dtype)
        data = [batch.to(dtype) for batch in data_for("conv2d", (4, 4, 4))]
        refresh_norm(model, data, estimator=estimator)
        exact = [batch.double() for batch in data]
        if estimator == "exact":
            variance = torch.cat(exact).var((0, 2, 3), correction=0)
        else:
            variance = torch.stack([batch.var((0, 2, 3)) for batch in exact]).mean(0)
        mean = torch.cat(exact).mean((0, 2, 3))
        assert torch.equal(model.running_mean, mean.to(dtype))
        assert torch.equal(model.running_var, variance.to(dtype))

    def test_buffers_of_32_bits_may_see_16(self):
        model: Any = nn.BatchNorm2d(3)
        data = [batch.bfloat16() for batch in data_for("conv2d", (4, 4, 4))]
        refresh_norm(model, data, estimator="torch")
        everything = torch.cat(data).double()
        torch.testing.assert_close(model.running_mean.double(), everything.mean((0, 2, 3)))

    def test_sync_batch_norm_needs_no_process_group(self):
        assert not torch.distributed.is_initialized()
        report = refresh_norm(make("sync"), data_for("sync"))
        assert len(report.layers) == 3

    def test_sync_batch_norm_is_local_where_there_is_one(self):
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
        try:
            model, other = make("sync"), make("conv2d")
            before = Snapshot(model)
            with pytest.raises(ValueError, match="SyncBatchNorm expected"):
                model.train()(data_for("sync")[0])
            refresh_norm(model, data_for("sync"))
            refresh_norm(other, data_for("sync"))
            assert_same_statistics(model, other, 1e-12)
            before.check(but=STATISTICS)
        finally:
            torch.distributed.destroy_process_group()

    def test_one_without_a_counter_works(self):
        model: Any = nn.BatchNorm1d(5)
        model.num_batches_tracked = None
        refresh_norm(model, data_for("mlp"))
        assert model.num_batches_tracked is None
        assert not torch.equal(model.running_mean, torch.zeros(5))


class TestSubclasses:
    def test_one_with_an_activation_works(self):
        class NormAct(nn.BatchNorm2d):
            def forward(self, values):
                return super().forward(values).relu_()

        model = nn.Sequential(nn.Conv2d(3, 8, 3), NormAct(8))
        other = nn.Sequential(copy.deepcopy(model[0]), nn.BatchNorm2d(8))
        refresh_norm(model, data_for("conv2d"), estimator="torch")
        update_bn(data_for("conv2d"), other)
        assert_same_statistics(model, other, 1e-5)

    @pytest.mark.parametrize("estimator", ["torch", "paper", "exact"])
    def test_one_that_normalises_piece_by_piece_is_seen_whole(self, estimator):
        class Ghost(nn.BatchNorm1d):
            def forward(self, values):
                return torch.cat([super(Ghost, self).forward(one) for one in values.chunk(2)])

        model, other = Ghost(5), nn.BatchNorm1d(5)
        refresh_norm(model, data_for("mlp"), estimator=estimator)
        refresh_norm(other, data_for("mlp"), estimator=estimator)
        assert_same_statistics(model, other, 1e-5)

    @pytest.mark.parametrize("estimator", ["torch", "paper", "exact"])
    def test_one_with_its_channels_last_is_understood(self, estimator):
        class Sequence(nn.BatchNorm1d):
            def forward(self, values):
                return super().forward(values.transpose(1, 2)).transpose(1, 2)

        model, other = Sequence(3), nn.BatchNorm1d(3)
        data = data_for("conv1d")
        refresh_norm(model, [batch.transpose(1, 2) for batch in data], estimator=estimator)
        refresh_norm(other, data, estimator=estimator)
        assert_same_statistics(model, other, 1e-5)


class Wrapped(nn.Module):
    """A block whose activations are recomputed, as activation checkpointing does it."""

    def __init__(self, *, restoring):
        super().__init__()
        self.body = make("conv2d")
        for layer in norms(self):
            # Like fairscale's checkpoint_wrapper: without gradients comes the first of two
            # forward passes, and only the second one is to track.
            layer.register_forward_pre_hook(self.stop_tracking)
            if restoring:
                layer.register_forward_hook(self.track_again)

    @staticmethod
    def stop_tracking(layer, _):
        if not torch.is_grad_enabled():
            layer.track_running_stats = False

    @staticmethod
    def track_again(layer, *_):
        if not torch.is_grad_enabled():
            layer.track_running_stats = True

    def forward(self, values):
        return checkpoint(self.body, values, use_reentrant=True)


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad=True")
class TestCheckpointWrappers:
    @pytest.mark.parametrize("restoring", [True, False])
    @pytest.mark.parametrize("estimator", ["torch", "paper", "exact"])
    def test_that_stop_tracking_do_not_stop_us(self, estimator, restoring):
        model, other = Wrapped(restoring=restoring), make("conv2d")
        before = Snapshot(model)
        refresh_norm(model, data_for("conv2d"), estimator=estimator)
        refresh_norm(other, data_for("conv2d"), estimator=estimator)
        assert_same_statistics(model, other, 1e-5)
        before.check(but=STATISTICS)

    def test_that_stop_it_in_later_batches_do_not_either(self):
        model, other, calls = make("mlp"), make("mlp"), itertools.count()

        def now_and_then(layer, _):
            layer.track_running_stats = next(calls) % 2 == 0

        model[1].register_forward_pre_hook(now_and_then)
        refresh_norm(model, data_for("mlp"), estimator="torch")
        refresh_norm(other, data_for("mlp"), estimator="torch")
        assert_same_statistics(model, other, 1e-5)
        assert model[1].track_running_stats

    def test_without_a_wrapper_reentrant_checkpoints_count_once(self):
        model, other = make("mlp"), make("mlp")
        refresh_norm(
            model,
            data_for("mlp"),
            estimator="torch",
            forward=lambda model, batch: checkpoint(model, batch, use_reentrant=True),
        )
        update_bn(data_for("mlp"), other)
        assert_same_statistics(model, other, 1e-5)


class Pair(NamedTuple):
    label: torch.Tensor
    image: torch.Tensor


Named = namedtuple("Named", ["image", "label"])  # noqa: PYI024 - users have both kinds


class TestBatches:
    def expected(self):
        model = make("mlp")
        refresh_norm(model, data_for("mlp"))
        return model

    @pytest.mark.parametrize(
        "wrap",
        [
            lambda batch: batch,
            lambda batch: [batch, torch.zeros(3)],
            lambda batch: (batch,),
            lambda batch: (batch, {"weights": [torch.zeros(3), "text", None]}),
            lambda batch: Named(batch, torch.zeros(3)),
        ],
        ids=["tensor", "list", "tuple", "nested", "namedtuple"],
    )
    def test_of_a_tensor_or_a_sequence_that_begins_with_one(self, wrap):
        model = make("mlp")
        report = refresh_norm(model, map(wrap, data_for("mlp")))
        assert_same_statistics(model, self.expected(), 1e-12)
        assert report.samples == 53

    @pytest.mark.parametrize(
        ("wrap", "take"),
        [
            (lambda batch: {"x": batch, "id": 3}, lambda batch: batch["x"]),
            (lambda batch: {"a": [{"b": (0, batch)}]}, lambda batch: batch["a"][0]["b"][1]),
            (lambda batch: Pair(torch.zeros(len(batch)), batch), lambda batch: batch.image),
            (lambda batch: batch.numpy(), torch.from_numpy),
        ],
        ids=["dict", "nested", "namedtuple", "array"],
    )
    def test_of_anything_with_a_forward(self, wrap, take):
        model = make("mlp")
        report = refresh_norm(
            model, map(wrap, data_for("mlp")), forward=lambda model, batch: model(take(batch))
        )
        assert_same_statistics(model, self.expected(), 1e-12)
        assert report.samples == 53

    @pytest.mark.parametrize(
        ("batch", "what"),
        [
            ({"x": torch.zeros(4, 5)}, "a dict"),
            (UserDict(x=torch.zeros(4, 5)), "a dict"),
            ([{"x": torch.zeros(4, 5)}], "a list that begins with a dict"),
            ((), "a tuple"),
            ("text", "a str"),
            (None, "a NoneType"),
        ],
        ids=str,
    )
    def test_of_anything_else_are_a_clear_error(self, batch, what):
        model = make("mlp")
        before = Snapshot(model)
        with pytest.raises(
            RefreshError, match=rf"the loader yields {what}.*, and .*`forward`"
        ) as one:
            refresh_norm(model, [batch])
        assert one.value.__cause__ is None
        before.check()

    def test_may_come_from_a_generator(self):
        model = make("mlp")
        report = refresh_norm(model, (batch for batch in data_for("mlp")))
        assert_same_statistics(model, self.expected(), 1e-12)
        assert report.batches == 4

    def test_none_at_all_is_an_error(self):
        model = make("mlp")
        before = Snapshot(model)
        with pytest.raises(RefreshError, match=r"the loader gave no batches; .*only once"):
            refresh_norm(model, iter(()))
        before.check()

    @pytest.mark.parametrize(
        ("options", "batches", "samples"),
        [
            ({"max_samples": 20}, 3, 24),
            ({"max_samples": 24}, 3, 24),
            ({"max_samples": 25}, 4, 32),
            ({"max_samples": 1}, 1, 8),
        ],
        ids=str,
    )
    def test_may_be_endless_with_a_limit(self, options, batches, samples):
        made = draw((8,) * 10, 5)
        drawn = []

        def endless():
            for index in itertools.count():
                drawn.append(index)
                yield made[index]

        model, other = make("mlp"), make("mlp")
        report = refresh_norm(model, endless(), **options)
        refresh_norm(other, made[:batches])
        assert (report.batches, report.samples, len(drawn)) == (batches, samples, batches)
        assert_same_statistics(model, other, 1e-12)

    def test_the_last_is_left_with_a_limit_it_reaches_by_itself(self):
        report = refresh_norm(make("mlp"), data_for("mlp"), max_samples=1000)
        assert (report.batches, report.samples) == (4, 53)


class TestMoved:
    def test_takes_every_tensor_along(self):
        batch = {
            "list": [torch.zeros(2), (torch.ones(3), "text")],
            "pair": Pair(torch.zeros(2, dtype=torch.int64), torch.zeros(2, 3)),
            "none": None,
            "number": 3.5,
        }
        there = moved(batch, torch.device("meta"))
        assert there["list"][0].is_meta
        assert isinstance(there["list"][1], tuple)
        assert there["list"][1][0].is_meta
        assert there["list"][1][1] == "text"
        assert isinstance(there["pair"], Pair)
        assert there["pair"].image.is_meta
        assert there["pair"].label.dtype == torch.int64
        assert (there["none"], there["number"]) == (None, 3.5)
        assert not batch["list"][0].is_meta  # type: ignore[index, union-attr]

    @pytest.mark.parametrize("kind", [dict, OrderedDict, UserDict])
    def test_keeps_the_type_of_a_dict(self, kind):
        batch = kind(x=torch.zeros(2), y=1)
        there = moved(batch, torch.device("meta"))
        assert type(there) is kind
        assert there["x"].is_meta
        assert not batch["x"].is_meta

    def test_lets_an_object_move_itself(self):
        packed = nn.utils.rnn.pack_sequence([torch.zeros(3, 2), torch.zeros(2, 2)])
        assert isinstance(moved(packed, CPU), nn.utils.rnn.PackedSequence)

    def test_converts_images_and_only_them(self):
        seen: list[bool] = []

        def forward(model, batch):
            seen.extend(each.is_contiguous(memory_format=torch.channels_last) for each in batch[:2])
            seen.append(batch[2].is_contiguous())
            model(batch[0])

        images = torch.rand(2, 3, 8, 8)
        refresh_norm(
            make("conv2d"), [[images, images.int(), images[0]]],
            memory_format="channels_last", forward=forward,
        )  # fmt: skip
        assert seen == [True, False, True]

    @pytest.mark.parametrize(
        ("memory_format", "name", "expected"),
        [
            ("auto", "conv2d", True),
            ("auto", "conv3d", True),
            ("channels_last", "conv2d", True),
            ("contiguous", "conv2d", False),
            ("contiguous", "conv3d", False),
        ],
    )
    def test_the_model_gets_them_as_asked(self, memory_format, name, expected):
        seen = []

        def forward(model, batch):
            layout = torch.channels_last if batch.dim() == 4 else torch.channels_last_3d
            seen.append(batch.is_contiguous(memory_format=layout))
            model(batch)

        refresh_norm(make(name), data_for(name), memory_format=memory_format, forward=forward)
        assert seen == [expected] * 4

    @pytest.mark.parametrize(
        ("groups", "side", "expected"),
        [(1, 7, False), (1, 8, True), (64, 7, True)],
        ids=["few pixels", "enough", "depthwise"],
    )
    def test_auto_keeps_small_batches_contiguous_for_large_models(
        self, groups, side, expected, monkeypatch
    ):
        """73,728 weights are 300 for each of 246 pixels; a batch has 196 or 256."""
        monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
        model: Any = nn.Sequential(
            nn.Conv2d(64, 64, 3, padding=1, groups=groups),
            nn.Conv2d(64, 64 if groups == 1 else 128, 3, padding=1),
        )
        model.append(nn.BatchNorm2d(model[1].out_channels))
        filters = model[1].weight.data
        seen: list[bool] = []

        def forward(model, batch):
            seen.append(model[1].weight.is_contiguous(memory_format=torch.channels_last))
            seen.append(batch.is_contiguous(memory_format=torch.channels_last))
            model(batch)

        refresh_norm(model, [torch.rand(4, 64, side, side)] * 2, forward=forward)
        assert seen == [expected] * 4
        assert model[1].weight.data_ptr() == filters.data_ptr()
        assert model[1].weight.is_contiguous()

    def test_auto_takes_filters_that_are_computed_in_each_call(self):
        """Equalised learning rates: there is no parameter `weight`, or none yet."""
        model: Any = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
        filters = model[0].weight
        del model[0].weight
        model[0].register_parameter("weight_orig", filters)
        model[0].register_forward_pre_hook(
            lambda module, _: setattr(module, "weight", module.weight_orig * 2)
        )
        assert len(refresh_norm(model, data_for("conv2d")).layers) == 1

    def test_auto_leaves_the_images_of_other_models_alone(self):
        seen = []

        def forward(model, batch):
            seen.append(batch.is_contiguous())
            model(batch)

        refresh_norm(nn.BatchNorm2d(3), data_for("conv2d"), forward=forward)
        assert seen == [True] * 4

    def test_goes_to_the_models_device_or_to_the_one_given(self):
        seen = []

        def forward(model, batch):
            seen.append(batch.device.type)
            model(torch.zeros(4, 5))

        refresh_norm(make("mlp"), data_for("mlp")[:1], forward=forward)
        refresh_norm(make("mlp"), data_for("mlp")[:1], forward=forward, device="meta")
        refresh_norm(nn.BatchNorm1d(5, affine=False), data_for("mlp")[:1], forward=forward)
        assert seen == ["cpu", "meta", "cpu"]


@pytest.mark.parametrize(
    ("batch", "size"),
    [
        (torch.zeros(7, 2), 7),
        ((torch.zeros(7, 2), torch.zeros(3)), 7),
        ({"epoch": torch.tensor(3), "x": torch.zeros(7, 2)}, 7),
        ({"id": "abc", "more": [None, {"x": torch.zeros(7)}]}, 7),
        (torch.zeros(7).numpy(), 7),
        ((tuple(torch.zeros(3, 8 + size, 9) for size in range(5)), torch.zeros(5)), 5),
        (((torch.zeros(32, 2), torch.zeros(32)), (torch.zeros(32), torch.zeros(32, 4))), 32),
        ([torch.zeros(4, 16, 5)], 4),
        ([torch.zeros(4, 16, 5), torch.zeros(4, 16, 2)], 4),
        (([torch.zeros(6, 8, 9)] * 8, [{"boxes": torch.zeros(5, 4)}] * 8), 8),
        (([torch.zeros(20, 30)] * 8, torch.zeros(8)), 8),
        ({"targets": [{"boxes": torch.zeros(5, 4)}] * 8, "images": [torch.zeros(3, 8, 9)] * 8}, 8),
        ([{"image": torch.zeros(3, 8, 9)}, {"image": torch.zeros(3, 7, 9)}], 2),
        (([torch.zeros(3, 8, 9)] * 5, [{"boxes": torch.zeros(2, 4)}] * 5), 5),
        (([torch.zeros(1, 8, 9)] * 5, torch.zeros(5)), 5),
        (([torch.zeros(40), torch.zeros(30)], ["a", "b"]), 2),
        (([torch.zeros(7, 2), torch.zeros(7, 3)], torch.zeros(7)), 7),
        ({"image": torch.zeros(7, 3, 8, 8), "mask": torch.zeros(7, 8, 8)}, 7),
        ((torch.zeros(3, 8, 9), torch.zeros(3)), 3),
        (SimpleNamespace(num_graphs=4, x=torch.zeros(60, 2), to=None), 4),
        (nn.utils.rnn.pack_sequence([torch.zeros(3, 2), torch.zeros(2, 2)]), 2),
        (["a", "b", "c"], 3),
        ((["a", "b", "c"], [1, 2, 3]), 3),
        (torch.tensor(3), 1),
        ("text", 1),
        ((), 1),
        (object(), 1),
    ],
    ids=lambda value: type(value).__name__,
)
def test_the_examples_of_a_batch_are_counted(batch, size):
    assert count_examples(batch) == size


def test_default_forward_returns_what_the_model_does():
    assert default_forward(nn.Identity(), (torch.ones(2), 3)).tolist() == [1, 1]  # type: ignore[attr-defined]


class TestReport:
    def test_says_how_much_has_changed(self):
        [data] = draw((4000,), 3, mean=0)
        data = (data - data.mean(0)) / data.std(0, correction=0)
        data = data * torch.tensor([1.0, 2.0, 0.5]) + torch.tensor([0.0, 6.0, 0.1])
        model: Any = nn.BatchNorm1d(3, eps=1e-12)
        report = refresh_norm(model, [data], estimator="exact")
        assert (report.estimator, report.batches, report.samples) == ("exact", 1, 4000)
        [layer] = report.layers
        assert (layer.name, layer.calls) == ("", 1)
        # Channel 1 moved by 6 = 3 of its standard deviations; its variance from 1 to 4, and that
        # of channel 2 from 1 to 1/4.
        assert layer.mean_change == pytest.approx(3, rel=1e-5)
        assert layer.variance_ratio == pytest.approx(4, rel=1e-5)

    def test_a_smaller_variance_is_as_much_of_a_change(self):
        [data] = draw((4000,), 3, mean=0, std=0.1)
        report = refresh_norm(nn.BatchNorm1d(3), [data])
        assert report.layers[0].variance_ratio == pytest.approx(100, rel=0.1)

    @pytest.mark.parametrize("old", [torch.nan, torch.inf, -torch.inf])
    def test_of_what_was_no_number_is_infinite(self, old):
        model: Any = nn.BatchNorm1d(5)
        model.running_mean[2], model.running_var[3] = old, old
        [layer] = refresh_norm(model, data_for("mlp")).layers
        assert (layer.mean_change, layer.variance_ratio) == (torch.inf, torch.inf)

    def test_of_a_variance_that_was_negative_is_too(self):
        model: Any = nn.BatchNorm1d(5)
        model.running_var[3] = -0.5
        [layer] = refresh_norm(model, data_for("mlp")).layers
        assert layer.variance_ratio == torch.inf

    def test_layers_are_in_the_models_order(self):
        report = refresh_norm(make("conv2d"), data_for("conv2d"))
        assert [layer.name for layer in report.layers] == ["1", "4", "7"]

    def test_progress_is_told_of_each_batch(self):
        def heard(batches, **options):
            told: list[tuple[int, int | None]] = []
            refresh_norm(make("mlp"), batches, progress=lambda *one: told.append(one), **options)
            return told

        data = data_for("mlp")
        assert heard(data) == [(1, 4)] * 4
        assert heard(iter(data)) == [(1, None)] * 4

        class Unsure(list):
            def __len__(self):
                raise NotImplementedError

        assert heard(Unsure(data)) == [(1, None)] * 4


@pytest.mark.parametrize("option", ["estimator", "memory_format", "train_mode"])
def test_an_unknown_choice_is_an_error(option):
    with pytest.raises(RefreshError, match=f"`{option}` must be one of .*, not 'other'"):
        refresh_norm(make("mlp"), data_for("mlp"), **{option: "other"})  # type: ignore[arg-type]


class Counter(TorchDispatchMode):
    """Counts what makes the host wait for the device: reading a value, or copying it over."""

    def __init__(self):
        super().__init__()
        self.waits = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.waits += function.overloadpacket in (
            torch.ops.aten._local_scalar_dense,
            torch.ops.aten.nonzero,
        )
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("estimator", ["paper", "torch", "exact"])
def test_the_host_waits_for_the_device_no_oftener_for_more_layers(estimator):
    """Nothing is copied over for each layer and batch."""
    waits = {}
    for layers, batches in itertools.product((1, 9), (1, 11)):
        model = nn.Sequential(*(nn.BatchNorm2d(3) for _ in range(layers)))
        with Counter() as counter:
            refresh_norm(model, draw((4,) * batches, 3, 5, 5), estimator=estimator)
        waits[layers, batches] = counter.waits
    for_a_batch = [(waits[layers, 11] - waits[layers, 1]) / 10 for layers in (1, 9)]
    assert for_a_batch[0] == for_a_batch[1] <= 3
