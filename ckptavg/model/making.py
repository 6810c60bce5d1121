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
from ckptavg.errors import RefreshError, UserCodeError, without_notices
from ckptavg.model.arguments import complete_arguments, wrong_arguments
from ckptavg.model.batches import attribute_of
from ckptavg.model.datamodules import METHODS, data_module_of, defines, is_data_module, with_hooks
from ckptavg.model.factories import load_object, name_of, user_code
from ckptavg.model.loading import unwrapped
from ckptavg.model.modes import is_trainer

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from ckptavg.formats.checkpoint import Checkpoint
    from ckptavg.model.datamodules import Stage
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
    spec: Loader,
    arguments: Mapping[str, Any],
    stage: Stage,
    model: torch.nn.Module,
    checkpoints: Iterable[Checkpoint] = (),
    *,
    option: str = "loader",
) -> Iterable[Any]:
    """The iterable of batches that a spec names, or that the callable returns which it names.

    Args:
        spec: an iterable, a callable that returns it, or the spec of either; a Lightning data
            module, or one of its methods that return loaders.
        arguments: keywords for the callable.
        stage: which batches of a data module are wanted, unless the spec names a method.
        model: what the batches are for: Lightning's hooks that change them are called.
        checkpoints: may record a data module's hyper-parameters, which are keywords too.
        option: the option that names it.

    Raises:
        RefreshError: it is no iterable, or a data module without such batches.
        UserCodeError: the callable raised.
    """
    spec, stage = data_module_of(spec, stage)
    value = _made(spec, arguments, checkpoints, option)
    data_module = value if is_data_module(value) else None
    if data_module is not None:
        what = _method_of(data_module, name_of(spec), stage)
        with user_code(what):
            data_module.prepare_data()
            data_module.setup(stage)
            value = _only_loader(getattr(data_module, METHODS[stage])(), what)
    if not hasattr(value, "__iter__") or isinstance(value, type | torch.nn.Module):
        raise _no_batches(value, name_of(spec), is_training=stage == "fit")
    return with_hooks(value, data_module, unwrapped(model))


def _made(
    spec: Loader, arguments: Mapping[str, Any], checkpoints: Iterable[Checkpoint], option: str
) -> Any:  # noqa: ANN401 - the user's own
    """The loader or the data module that a spec names, or that the callable returns."""
    value: Any = load_object(spec)
    is_class = isinstance(value, type)
    if not is_class and (hasattr(value, "__iter__") or is_data_module(value)):
        _refuse_arguments(spec, arguments)
        return value
    if not callable(value):
        return value
    if is_class and is_data_module(value):
        arguments = complete_arguments(
            value, arguments, checkpoints, f"{option}_arg",
            of_data=not issubclass(value, torch.nn.Module),
        )  # fmt: skip
    return _called(value, name_of(spec), arguments, f"{option}_arg")


def _method_of(data_module: object, name: str, stage: Stage) -> str:
    """What messages call the method that returns a data module's loader.

    Raises:
        RefreshError: the data module does not define it.
    """
    method = METHODS[stage]
    if not defines(data_module, method):
        raise RefreshError(
            f"{name} has no {method}()",
            remedy="define it, or name a function that returns the batches",
        )
    return f"{name}.{method}()"


def check_test_loader(
    test: tuple[Loader, Mapping[str, Any]],
    other: tuple[Loader, Mapping[str, Any]],
    stage: Stage,
    checkpoints: Iterable[Checkpoint],
) -> None:
    """Refuse a test loader that is the other loader, or a data module without test batches.

    Args:
        test: the test loader and its keywords.
        other: the other loader and its keywords.
        stage: which batches of a data module the other loader is.
        checkpoints: as in `make_batches`.

    Raises:
        RefreshError: it is one of these.
    """
    spec, test_stage = data_module_of(test[0], "test")
    other_spec, stage = data_module_of(other[0], stage)
    is_same = spec is other_spec or (isinstance(spec, str) and spec == other_spec)
    is_same = is_same and test[1] == other[1]
    value = load_object(spec)
    if is_same or is_data_module(value):
        with without_notices():
            value = _made(spec, test[1], checkpoints, "test_loader")
    if is_data_module(value):
        _method_of(value, name_of(spec), test_stage)
        is_same = is_same and test_stage == stage
    if is_same:
        raise RefreshError(
            "`loader` and `test_loader` are the same batches",
            remedy="let `test_loader` name other data",
        )


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
