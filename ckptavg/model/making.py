"""Make the user's model and loader out of what he named, always alike for the same seed."""

from __future__ import annotations

import contextlib
import itertools
import logging
import random
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader

from ckptavg.distributed import local_device
from ckptavg.errors import RefreshError, UserCodeError
from ckptavg.model.arguments import complete_arguments, wrong_arguments
from ckptavg.model.batches import attribute_of
from ckptavg.model.factories import load_object, name_of, user_code
from ckptavg.model.modes import is_trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.model.factories import Loader, Model


log = logging.getLogger("ckptavg")


def seed_everything(seed: int) -> None:
    """Seed Python's, numpy's and torch's generators, which users' code draws from."""
    random.seed(seed)
    np.random.seed(seed % (1 << 32))  # noqa: NPY002
    if torch.accelerator.is_available():
        torch.manual_seed(seed % (1 << 64))
    else:  # for each kind of device that is not there, the other would keep a stack trace
        torch.default_generator.manual_seed(seed % (1 << 64))


class RandomState:
    """The state of the generators that `seed_everything` seeds."""

    def __init__(self) -> None:
        self._python, self._numpy = random.getstate(), np.random.get_state()  # noqa: NPY002
        self._torch = torch.get_rng_state()
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_available() else []

    def restore(self) -> None:
        """Go back to it."""
        random.setstate(self._python)
        np.random.set_state(self._numpy)  # noqa: NPY002
        torch.set_rng_state(self._torch)
        if self._cuda:
            torch.cuda.set_rng_state_all(self._cuda)


@contextlib.contextmanager
def random_state_kept() -> Iterator[None]:
    """Leave the caller's random numbers as they were."""
    state = RandomState()
    try:
        yield
    finally:
        state.restore()


def import_all(seed: int, model: Model, *others: object) -> None:
    """Import what the specs name, and seed everything.

    What a module draws while it is imported is drawn once: it is not to depend on what was drawn
    before, and what is drawn later not on whether it was imported then.

    Args:
        seed: of all random numbers.
        model: spec of the model.
        others: specs of other things.
    """
    seed_everything(seed)
    load_object(model)
    for spec in others:
        if spec is not None:
            seed_everything(seed)
            load_object(spec)
    seed_everything(seed)


def make_model(
    spec: Model,
    arguments: Mapping[str, Any],
    device: torch.device | str | None,
    checkpoints: Iterable[Checkpoint] = (),
) -> torch.nn.Module:
    """The model that a spec names, or that the callable returns which it names.

    Args:
        spec: a model, a callable that returns it, or the spec of either.
        arguments: keywords for the callable.
        device: where it is put; None for a GPU if there is one.
        checkpoints: may record the model's hyper-parameters, which are keywords too.

    Raises:
        RefreshError: it is no model, or does not go there.
        UserCodeError: the callable raised.
    """
    model = load_object(spec)
    if isinstance(model, torch.nn.Module):
        _refuse_arguments(spec, arguments)
    elif callable(model):
        arguments = complete_arguments(model, arguments, checkpoints)
        model = _called(model, name_of(spec), arguments, "model_arg")
    model = _network_of(model, name_of(spec))
    if any(tensor.is_meta for tensor in itertools.chain(model.parameters(), model.buffers())):
        raise RefreshError(
            f"{name_of(spec)} has tensors on device 'meta', which hold no values",
            remedy="make the model on the CPU",
        )
    place = local_device(device)
    try:
        if torch.device(place).type == "meta":
            raise RefreshError("on device 'meta' nothing is computed")
        return model.to(place)
    except (RuntimeError, NotImplementedError, AssertionError) as error:
        raise RefreshError(f"cannot use device {str(place)!r}: {error}") from error


def _called(
    function: Callable[..., Any], name: str, arguments: Mapping[str, Any], option: str
) -> Any:  # noqa: ANN401 - the user's own
    """What the user's function returns.

    Args:
        function: the function, or a class.
        name: what messages call it.
        arguments: its keywords.
        option: the option that gives them.

    Raises:
        RefreshError: it does not accept these keywords.
        UserCodeError: it raised.
    """
    try:
        with user_code(name):
            return function(**arguments)
    except UserCodeError as error:
        # Not before the call: a decorator may supply arguments of which the signature tells.
        is_refused = isinstance(error.__cause__, TypeError)
        refusal = wrong_arguments(function, name, arguments, option) if is_refused else None
        if refusal is None:
            raise
        raise refusal from error


def _network_of(value: object, name: str) -> torch.nn.Module:
    """A network; what trains one, as a `Trainer`, a `Learner` or a `YOLO`, has it as `model`.

    Raises:
        RefreshError: there is none.
    """
    if isinstance(value, torch.nn.Module) and not is_trainer(value):
        return value
    for attribute in ("model", "module_"):  # of most; of skorch
        inner = attribute_of(value, attribute)
        if isinstance(inner, torch.nn.Module):
            log.info("%s is a %s: using its attribute '%s'", name, type(value).__name__, attribute)
            return inner
    if isinstance(value, torch.nn.Module):
        return value
    raise RefreshError(
        f"{name} is a {type(value).__name__}, not a torch.nn.Module",
        remedy="name the network, or a function that returns it",
    )


def make_batches(
    spec: Loader, arguments: Mapping[str, Any], *, is_training: bool, option: str = "loader"
) -> Iterable[Any]:
    """The iterable of batches that a spec names, or that the callable returns which it names.

    Args:
        spec: an iterable, a callable that returns it, or the spec of either.
        arguments: keywords for the callable.
        is_training: whether training data are wanted, of a Lightning data module, or held-out ones.
        option: the option that names it.

    Raises:
        RefreshError: it is no iterable.
        UserCodeError: the callable raised.
    """
    value: Any = load_object(spec)
    if hasattr(value, "__iter__") and not isinstance(value, type):
        _refuse_arguments(spec, arguments)
    elif callable(value):
        value = _called(value, name_of(spec), arguments, f"{option}_arg")
    stage, method = ("fit", "train_dataloader") if is_training else ("validate", "val_dataloader")
    if callable(getattr(value, method, None)):
        with user_code(f"{name_of(spec)}.{method}()"):
            value.prepare_data()
            value.setup(stage)
            value = _only_loader(getattr(value, method)(), f"{name_of(spec)}.{method}()")
    if not hasattr(value, "__iter__") or isinstance(value, type | torch.nn.Module):
        raise _no_batches(value, name_of(spec), is_training=is_training)
    batches: Iterable[Any] = value
    return batches


def _no_batches(value: object, name: str, *, is_training: bool) -> RefreshError:
    """The error about what is not a loader: often it is a dataset."""
    kind = type(value).__name__
    if hasattr(value, "__getitem__") and not isinstance(value, type | torch.nn.Module):
        shuffle = ", shuffle=True" if is_training else ""
        loader = f"torch.utils.data.DataLoader(dataset, batch_size=...{shuffle})"
        return RefreshError(
            f"{name} is a dataset ({kind}), which returns examples, not batches",
            remedy=f"name a function that returns {loader}",
        )
    return RefreshError(
        f"{name} is a {kind}, which returns no batches",
        remedy="let it be an iterable of batches, such as a DataLoader, or return one",
    )


def _only_loader(returned: Any, what: str) -> Any:  # noqa: ANN401 - the user's own
    """What a data module returns; of a collection its only loader.

    Raises:
        RefreshError: there are several.
    """
    loaders = list(returned.values()) if isinstance(returned, Mapping) else returned
    if not isinstance(loaders, list | tuple) or not any(
        isinstance(each, DataLoader) for each in loaders
    ):
        return returned
    if len(loaders) > 1:
        raise RefreshError(
            f"{what} returns {len(loaders)} loaders",
            remedy="name a function that returns one of them",
        )
    return loaders[0]


def _refuse_arguments(spec: object, arguments: Mapping[str, Any]) -> None:
    if arguments:
        raise RefreshError(
            f"{name_of(spec)} is no callable: there is nothing to pass {', '.join(arguments)} to",
            remedy="name a function that takes it",
        )
