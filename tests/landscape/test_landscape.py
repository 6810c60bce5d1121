"""Rays, segments and planes: where the points are, what is evaluated there, and that once."""

from __future__ import annotations

import csv
import fcntl
import hashlib
import json
import os
import signal
import sqlite3
import threading
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file, save_model
from torch import nn

from ckptavg.batchnorm.options import RefreshOptions
from ckptavg.errors import CkptAvgError, OutputError, SelectionError
from ckptavg.evaluation.evaluate import EvaluationOptions
from ckptavg.formats import open_checkpoint
from ckptavg.landscape.explore import ExploreOptions
from ckptavg.landscape.places import Place, Space
from ckptavg.landscape.plane import Plane, plane
from ckptavg.landscape.rays import rays
from ckptavg.landscape.segment import segment
from ckptavg.write import temporary
from tests.helpers import run
from tests.ranks import Job, command

SETUP = '''
import os, signal
from pathlib import Path
import torch
from torch import nn
from torch.nn.functional import cross_entropy

def make_model(dtype="float64"):
    return nn.Sequential(
        nn.Conv1d(1, 4, 3), nn.BatchNorm1d(4), nn.ReLU(), nn.Flatten(), nn.Linear(24, 3)
    ).to(getattr(torch, dtype))

def loader(seed=0, dtype="float64"):
    made = torch.Generator().manual_seed(seed)
    x = torch.randn(60, 1, 8, generator=made, dtype=torch.float64).to(getattr(torch, dtype))
    return [(x[i:i + 20], (x[i:i + 20, 0, :3].argmax(1))) for i in (0, 20, 40)]

def test_loader(dtype="float64"):
    return loader(7, dtype)

def logged(model, batches):
    """Counts its calls in a file, and may be killed by the one before which `KILL_AT` were."""
    log = Path(f"log-{os.environ.get('RANK', 0)}")
    calls = len(log.read_text().splitlines()) if log.exists() else 0
    if calls == int(os.environ.get("KILL_AT", -1)):
        os.kill(os.getpid(), signal.SIGKILL)
    weights = [float(value.double().sum()) for value in model.parameters()]
    with log.open("a") as file:
        file.write(repr(weights) + "\\n")
    return {"sum": sum(weights)}


def fickle(model, batches):
    """Returns a metric of another name at each point."""
    log = Path("fickle")
    log.write_text(log.read_text() + "x" if log.exists() else "x")
    return {log.read_text(): 1.0}
'''


@pytest.fixture(name="here")
def _here(tmp_path, monkeypatch):
    """A directory with a model, batches and three checkpoints of it."""
    monkeypatch.chdir(tmp_path)
    Path("setup.py").write_text(SETUP)
    space: dict[str, Any] = {}
    exec(SETUP, space)  # noqa: S102
    for number in range(3):
        torch.manual_seed(number)
        save_file(space["make_model"]().state_dict(), f"w{number}.safetensors")
    return tmp_path


PATHS = [Path(f"w{number}.safetensors") for number in range(3)]


def options(*, refresh: bool = True, **more: Any) -> ExploreOptions:
    spec: dict[str, Any] = {"model": "setup.py:make_model", "loader": "setup.py:loader"}
    refresher = RefreshOptions(**spec) if refresh else None
    own = {name: more.pop(name) for name in ("metric", "max_samples") if name in more}
    return ExploreOptions(
        evaluation=EvaluationOptions(**spec, **own, refresh=refresher, device="cpu"), **more
    )


PARAMETERS = ["0.weight", "0.bias", "1.weight", "1.bias", "4.weight", "4.bias"]


def space_of(paths=PATHS, **more: Any) -> Space:
    return Space([open_checkpoint(path) for path in paths], PARAMETERS, **more)


def vector(checkpoint) -> np.ndarray:
    return np.concatenate([checkpoint.read(name).astype(np.float64).ravel() for name in PARAMETERS])


@pytest.mark.usefixtures("here")
class TestDirections:
    def test_are_uniform_on_the_sphere(self, tmp_path):
        state = {"a": torch.zeros(2, 1).double(), "b": torch.zeros(1).double()}
        save_file(state, tmp_path / "x.safetensors")
        space = Space([open_checkpoint(tmp_path / "x.safetensors")], ["a", "b"], seed=5)
        count = 4_000
        found = np.empty((count, 3))
        for number in range(count):
            at = space.at(Place((1.0,), number, 1.0))
            found[number] = np.concatenate([at.read("a").ravel(), at.read("b").ravel()])
        assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-12
        # Along any axis a point of the unit sphere in three dimensions is uniform in [-1, 1]
        # (Archimedes): Kolmogorov's distance exceeds 1.95 / sqrt(n) once in a thousand times.
        made = np.random.default_rng(0)
        for axis in (*np.eye(3), *made.standard_normal((5, 3))):
            along = np.sort(found @ axis / np.linalg.norm(axis))
            expected = (along + 1) / 2
            steps = np.arange(1, count + 1) / count
            gap = max((steps - expected).max(), (expected - steps + 1 / count).max())
            assert gap < 1.95 / np.sqrt(count)
        # Rayleigh's statistic: 3 n |mean|^2 is chi-squared with 3 degrees of freedom.
        assert 3 * count * np.sum(found.mean(axis=0) ** 2) < 16.3

    def test_are_of_the_distance_that_is_asked_for(self):
        space = space_of()
        centre = vector(open_checkpoint(PATHS[1]))
        for distance in (1e-3, 1.0, 123.4):
            for direction in range(5):
                moved = vector(space.at(Place((0.0, 1.0, 0.0), direction, distance)))
                assert np.linalg.norm(moved - centre) == pytest.approx(distance, rel=1e-12)

    def test_are_the_same_from_all_of_the_weights_and_for_the_same_seed(self):
        space = space_of(seed=3)
        steps = [
            vector(space.at(Place(one, 2, 1.5))) - vector(space.at(Place(one)))
            for one in ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.3, 0.3, 0.4))
        ]
        np.testing.assert_allclose(steps[0], steps[1], atol=1e-14)
        np.testing.assert_allclose(steps[0], steps[2], atol=1e-14)
        place = Place((1.0, 0.0, 0.0), 2, 1.5)
        again, other = space_of(seed=3), space_of(seed=4)
        np.testing.assert_array_equal(vector(again.at(place)), vector(space.at(place)))
        assert not np.allclose(vector(other.at(place)), vector(space.at(place)))

    def test_leave_buffers_alone(self):
        moved = space_of().at(Place((1.0, 0.0, 0.0), 0, 9.0))
        own = load_file(PATHS[0])
        for name in own.keys() - set(PARAMETERS):
            np.testing.assert_array_equal(moved.read(name), own[name].numpy())

    @pytest.mark.parametrize("distance", [0.01, 3.0])
    def test_of_half_precision_are_not_rounded_to_it(self, tmp_path, distance):
        state = {"a": torch.randn(500, 40).bfloat16()}
        save_file(state, tmp_path / "x.safetensors")
        space = Space([open_checkpoint(tmp_path / "x.safetensors")], ["a"])
        moved = space.at(Place((1.0,), 0, distance)).read("a").astype(np.float64)
        gap = np.linalg.norm(moved - state["a"].double().numpy())
        assert gap == pytest.approx(distance, rel=1e-3)

    def test_of_complex_parameters_are_uniform_too(self, tmp_path):
        state = {"a": torch.randn(30, 4, dtype=torch.complex128)}
        torch.save(state, tmp_path / "x.pt")
        space = Space([open_checkpoint(tmp_path / "x.pt")], ["a"])
        step = space.at(Place((1.0,), 0, 2.0)).read("a") - state["a"].numpy()
        assert np.linalg.norm(step) == pytest.approx(2.0)
        assert np.linalg.norm(step.real) == pytest.approx(np.sqrt(2), rel=0.2)
        assert space.dimension == 240


def naive(state, *, refresh=True):
    """Loss and error on both loaders, by torch alone."""
    space: dict[str, Any] = {}
    exec(SETUP, space)  # noqa: S102
    model = space["make_model"]()
    model.load_state_dict(state)
    if refresh:
        torch.optim.swa_utils.update_bn(space["loader"](), model)
    model.eval()
    found = {}
    for data in ("train", "test"):
        batches = space["loader" if data == "train" else "test_loader"]()
        x, y = (torch.cat(part) for part in zip(*batches, strict=True))
        with torch.no_grad():
            outputs = model(x)
        found[f"{data} loss"] = float(nn.functional.cross_entropy(outputs, y))
        found[f"{data} error"] = float((outputs.argmax(1) != y).double().mean())
    return found


def combined(*coefficients):
    states = [load_file(path) for path in PATHS]
    return {
        name: sum(c * state[name] for c, state in zip(coefficients, states, strict=True))
        if states[0][name].is_floating_point()
        else states[0][name]
        for name in states[0]
    }


TEST: dict[str, Any] = {"test_loader": "setup.py:test_loader"}


@pytest.mark.usefixtures("here")
class TestRays:
    def test_values_are_those_of_torch(self):
        found = rays(PATHS[:2], Path("o"), options(**TEST), directions=2, distances=(0, 1, 4))
        space = space_of(PATHS[:2])
        for place in range(2):
            for direction in range(2):
                for step, distance in enumerate((0, 1, 4)):
                    one = [0.0, 0.0]
                    one[place] = 1.0
                    at = space.at(Place(tuple(one), direction, distance))
                    state = {name: torch.from_numpy(np.array(at.read(name))) for name in at.tensors}
                    for metric, value in naive(state).items():
                        assert found.values[metric][place][direction][step] == pytest.approx(value)

    def test_begin_at_the_weights_themselves(self):
        found = rays(PATHS[:2], Path("o"), options(), directions=3, distances=(0, 1))
        for values in found.values.values():
            assert all(len({ray[0] for ray in rays_of_one}) == 1 for rays_of_one in values)

    def test_without_a_refresh_the_statistics_are_the_weights_own(self):
        found = rays(PATHS[:1], Path("o"), options(refresh=False), directions=1, distances=(0, 1))
        wanted = naive(load_file(PATHS[0]), refresh=False)["train loss"]
        assert found.values["train loss"][0][0][0] == pytest.approx(wanted)
        assert wanted != pytest.approx(naive(load_file(PATHS[0]))["train loss"], rel=1e-3)

    def test_go_twice_as_far_as_the_first_two_are_apart(self):
        found = rays(PATHS[:2], Path("o"), options(max_samples=20), directions=1)
        first, second = (vector(open_checkpoint(path)) for path in PATHS[:2])
        apart = np.linalg.norm(first - second)
        assert found.apart == pytest.approx(apart)
        assert found.axes["distance"][-1] == pytest.approx(2 * apart)
        assert found.dimension == len(vector(open_checkpoint(PATHS[0])))

    @pytest.mark.parametrize("distances", [(1, 2), (0, 2, 1), (0, 1, 1), (0, float("inf"))])
    def test_distances_that_make_no_ray_are_refused(self, distances):
        with pytest.raises(SelectionError, match="distances"):
            rays(PATHS[:1], Path("o"), options(), distances=distances)

    def test_metrics_of_ones_own(self):
        found = rays(
            PATHS[:1], Path("o"), options(metric="setup.py:logged"), directions=1, distances=(0, 1)
        )
        assert list(found.values) == ["train sum"]

    def test_metrics_that_change_between_points_are_an_error(self):
        with pytest.raises(SelectionError, match="returned other metrics: train xx"):
            rays(
                PATHS[:1], Path("o"), options(metric="setup.py:fickle"), directions=1,
                distances=(0, 1),
            )  # fmt: skip


@pytest.mark.usefixtures("here")
class TestSegment:
    def test_values_are_those_of_torch(self):
        found = segment(PATHS[:2], Path("o"), options(**TEST), positions=(-0.5, 0, 0.25, 1, 1.5))
        for place, position in enumerate(found.axes["position"]):
            wanted = naive(combined(1 - position, position, 0))
            for metric, value in wanted.items():
                assert found.values[metric][place] == pytest.approx(value)

    def test_reaches_past_both_ends(self):
        found = segment(PATHS[:2], Path("o"), options())
        assert found.axes["position"][0] == -0.5
        assert found.axes["position"][-1] == 1.5
        assert {0.0, 1.0} <= set(found.axes["position"])

    def test_is_between_two(self):
        with pytest.raises(SelectionError, match="2 checkpoints, not 3"):
            segment(PATHS, Path("o"), options())


@pytest.mark.usefixtures("here")
class TestPlane:
    def test_the_basis_is_orthonormal_and_holds_the_three_weights(self):
        first, u, v = basis()
        found = Plane(space_of().gram())
        for x, y in ((0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (-2.3, 0.7)):
            at = vector(space_of().at(Place(found.coefficients(x, y))))
            np.testing.assert_allclose(at, first + x * u + y * v, atol=1e-12)
        for number, corner in enumerate(found.corners):
            wanted = [float(number == other) for other in range(3)]
            np.testing.assert_allclose(found.coefficients(*corner), wanted, atol=1e-12)

    def test_the_three_weights_have_their_own_losses(self):
        found = plane(PATHS, Path("o"), options(**TEST), size=3)
        for corner, path in zip(found.corners, PATHS, strict=True):
            values = {metric: corner[metric] for metric in found.values}
            assert values == pytest.approx(naive(load_file(path)))

    def test_values_on_the_grid_are_those_of_torch(self):
        found = plane(PATHS, Path("o"), options(**TEST), size=3)
        made = Plane(space_of().gram())
        for row, y in enumerate(found.axes["y"]):
            for column, x in enumerate(found.axes["x"]):
                for metric, value in naive(combined(*made.coefficients(x, y))).items():
                    assert found.values[metric][row][column] == pytest.approx(value)
        xs, ys = zip(*made.corners, strict=True)
        assert found.axes["x"][0] == pytest.approx(min(xs) - 0.2 * (max(xs) - min(xs)))
        assert found.axes["y"][-1] == pytest.approx(max(ys) + 0.2 * (max(ys) - min(ys)))

    def test_three_on_a_line_make_none(self):
        save_file(combined(0.5, 0.5, 0), "w2.safetensors")
        with pytest.raises(SelectionError, match="on one line"):
            plane(PATHS, Path("o"), options())
        with pytest.raises(SelectionError, match="on one line"):
            plane([PATHS[0], PATHS[1], PATHS[1]], Path("o"), options())
        with pytest.raises(SelectionError, match="on one line"):
            plane([PATHS[0]] * 3, Path("o"), options())

    @pytest.mark.parametrize("value", ["nan", "inf"])
    def test_three_of_which_one_is_not_finite_make_none(self, value):
        third = combined(0, 0, 1)
        third["1.weight"].fill_(float(value))
        save_file(third, "w2.safetensors")
        for paths in (PATHS, [PATHS[0], PATHS[2], PATHS[1]], [PATHS[2], *PATHS[:2]]):
            with pytest.raises(SelectionError, match="or have NaN or Inf"):
                plane(paths, Path("o"), options())

    @pytest.mark.parametrize("count", [2, 4])
    def test_is_through_three(self, count):
        with pytest.raises(SelectionError, match="3 checkpoints"):
            plane((PATHS * 2)[:count], Path("o"), options())


def basis():
    """The first of the three weights, and an orthonormal basis of the plane through them."""
    first, second, third = (vector(open_checkpoint(path)) for path in PATHS)
    u = (second - first) / np.linalg.norm(second - first)
    v = third - first - ((third - first) @ u) * u
    return first, u, v / np.linalg.norm(v)


def arguments(kind, paths, *more, output="o"):
    names = [str(path) for path in paths]
    spec = ["--model", "setup.py:make_model", "--loader", "setup.py:loader"]
    return ["landscape", kind, *names, *spec, "-o", output, *more]


def start(*words, size=1, **environment):
    """The command in processes of their own."""
    return Job([command(*words)] * size, Path.cwd(), **environment)


LOGGED = ("--metric", "setup.py:logged", "--no-plots")
COUNTED = (*LOGGED, "--directions", "2", "--distances", "0,1,2")


@pytest.mark.usefixtures("here")
class TestResuming:
    def test_a_killed_run_goes_on_and_evaluates_no_point_twice(self):
        words = arguments("rays", PATHS[:2], *COUNTED)
        for at in (3, 7):
            start(*words, KILL_AT=str(at)).finish(-signal.SIGKILL)
            assert len(Path("log-0").read_text().splitlines()) == at
        start(*words).finish(0)
        lines = Path("log-0").read_text().splitlines()
        assert len(lines) == len(set(lines)) == 2 * (1 + 2 * 2)
        again = Path("o/rays.json").read_bytes()
        start(*words).finish(0)
        assert Path("log-0").read_text().splitlines() == lines
        assert Path("o/rays.json").read_bytes() == again

    def test_of_more_points_only_the_new_ones_are_evaluated(self):
        for positions in ("0,1", "0,0.5,1"):
            words = arguments("segment", PATHS[:2], *LOGGED, "--positions", positions)
            run(*words)
        assert len(Path("log-0").read_text().splitlines()) == 3

    def test_two_processes_share_the_points(self):
        said = start(*arguments("rays", PATHS[:2], *COUNTED), size=2).finish(0, 0)
        logs = [Path(f"log-{rank}").read_text().splitlines() for rank in range(2)]
        assert [len(log) for log in logs] == [5, 5]
        assert not set(logs[0]) & set(logs[1])
        start(*arguments("rays", PATHS[:2], *COUNTED, output="alone")).finish(0)
        assert Path("o/rays.json").read_bytes() == Path("alone/rays.json").read_bytes()
        assert said[1] == ("", "")

    def test_points_of_another_landscape_are_not_mixed_in(self):
        one: dict[str, Any] = {"directions": 1, "distances": (0, 1)}
        rays(PATHS[:1], Path("o"), options(), **one)
        for another in (
            lambda: segment(PATHS[:2], Path("o"), options()),
            lambda: rays(PATHS[:2], Path("o"), options(), **one),
            lambda: rays(PATHS[:1], Path("o"), options(refresh=False), **one),
        ):
            with pytest.raises(OutputError, match="points of other checkpoints, options or code"):
                another()
        save_file(combined(0, 1, 0), "w0.safetensors")
        with pytest.raises(OutputError, match="points of other checkpoints, options or code"):
            rays(PATHS[:1], Path("o"), options(), **one)
        found = rays(PATHS[:1], Path("o"), options(force=True), **one)
        wanted = naive(load_file(PATHS[0]))["train loss"]
        assert found.values["train loss"][0][0][0] == pytest.approx(wanted)


@pytest.mark.usefixtures("here")
class TestCommand:
    @pytest.mark.parametrize(
        ("kind", "count", "more", "rows"),
        [
            ("rays", 2, ("--directions=2", "--distances=0:1:3", "--metric=loss"), 2 * 2 * 3),
            ("segment", 2, ("--positions=-1:2:4", "--test-loader=setup.py:test_loader"), 4),
            ("plane", 3, ("--size=3", "--metric=loss"), 9),
        ],
    )
    def test_writes_tables_and_pictures_and_leaves_the_inputs(self, kind, count, more, rows):
        before = {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in PATHS}
        words = arguments(kind, PATHS[:count], *more)
        result = run(*words, "--json")
        told = json.loads(result.stdout)
        written = json.loads(Path(f"o/{kind}.json").read_text())
        assert written.pop("ckptavg")
        assert {name: told[name] for name in written} == written
        with Path(f"o/{kind}.csv").open(newline="") as file:
            table = list(csv.DictReader(file))
        assert len(table) == rows
        both = {"train loss", "train error", "test loss", "test error"}
        assert table[0].keys() & both == (both if kind == "segment" else {"train loss"})
        assert Path(f"o/{kind}.png").read_bytes().startswith(b"\x89PNG")
        assert "<svg" in Path(f"o/{kind}.svg").read_text()
        assert {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in PATHS} == before
        if kind == "plane":  # which has everything that the others draw, and contours
            files = [Path(f"o/{kind}.{ending}") for ending in ("png", "svg", "json", "csv")]
            first = [path.read_bytes() for path in files]
            run(*words)
            assert [path.read_bytes() for path in files] == first

    def test_says_in_words_how_the_weights_compare(self):
        words = arguments("rays", PATHS[:2], "--directions", "3", "--distances", "0,1")
        result = run(*words, "--no-plots")
        assert "loss rises less from w1.safetensors than from w0.safetensors in" in result.stdout
        assert not list(Path("o").glob("*.png"))

    @pytest.mark.parametrize(
        ("more", "code"),
        [
            (("--distances", "a"), 2), (("--distances", "0:1"), 2), (("--distances", "0:1:0"), 2),
            (("--distances", "0,nan"), 2), (("--distances", "1,2"), 1), (("--directions", "0"), 2),
            (("--model", "setup.py:loader"), 1),
        ],
    )  # fmt: skip
    def test_mistakes_are_one_line(self, more, code):
        result = run(*arguments("rays", PATHS[:1], "--no-plots"), *more, code=code)
        if code == 1:
            assert isinstance(result.exception, CkptAvgError)
        else:
            assert result.stderr.splitlines()[-1].startswith("Error: ")

    def test_checkpoints_of_two_models_are_refused(self):
        save_file({"w": torch.zeros(3)}, "w1.safetensors")
        with pytest.raises(CkptAvgError):
            rays(PATHS[:2], Path("o"), options())

    def test_a_directory_that_cannot_be_made_is_one_line(self):
        Path("o").write_text("")
        with pytest.raises(OutputError, match="cannot be made"):
            rays(PATHS[:1], Path("o"), options(), directions=1, distances=(0, 1))


def test_a_configuration_for_other_commands_is_no_mistake(here):
    (here / "pyproject.toml").write_text(
        '[tool.ckptavg]\nmodel = "setup.py:make_model"\nloader = "setup.py:loader"\n'
        "[tool.ckptavg.average]\nexpect = 3\n"
        "[tool.ckptavg.landscape]\ndirections = 1\nno-plots = true\n"
    )
    words = ["landscape", "rays", "w0.safetensors", "-o", "o", "--distances", "0,1"]
    result = run(*words)
    assert "1 direction from 1 point" in result.stdout
    result = run("landscape", "segment", "w0.safetensors", "-o", "p", code=1)
    assert isinstance(result.exception, SelectionError)


TIED = """
import torch
from torch import nn

class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.b_first = nn.Linear(6, 6, bias=False)
        self.a_second = nn.Linear(6, 6, bias=False)
        self.head = nn.Linear(6, 3)
        self.a_second.weight = self.b_first.weight

    def forward(self, x):
        return self.head(self.a_second(self.b_first(x).relu()))

loader = [(torch.randn(9, 6), torch.arange(9) % 3)]
seen = []

def where(model, batches):
    import json
    with open("where", "a") as file:
        flat = torch.cat([p.detach().flatten() for p in model.parameters()])
        print(json.dumps(flat.tolist()), file=file)
    return 0.0
"""


def tied(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    Path("tied.py").write_text(TIED)
    space: dict[str, Any] = {}
    exec(TIED, space)  # noqa: S102
    models = []
    for number in range(2):
        torch.manual_seed(number)
        models.append(space["Tied"]())
    evaluation = EvaluationOptions(
        model="tied.py:Tied", loader="tied.py:loader", metric="tied.py:where", device="cpu"
    )
    return models, ExploreOptions(evaluation=evaluation)


@pytest.mark.parametrize("kind", ["both names", "one name"])
def test_tied_parameters_move_together_and_count_once(tmp_path, monkeypatch, kind):
    models, how = tied(monkeypatch, tmp_path)
    for number, model in enumerate(models):
        if kind == "both names":
            torch.save(model.state_dict(), f"t{number}.pt")
        else:
            save_model(model, f"t{number}.pt")
    found = rays([Path("t0.pt"), Path("t1.pt")], Path("o"), how, directions=2, distances=(0, 1, 4))
    assert found.dimension == 36 + 21
    flat = [torch.cat([p.detach().flatten() for p in model.parameters()]) for model in models]
    assert found.apart == pytest.approx(float(torch.linalg.norm(flat[0] - flat[1])), rel=1e-5)
    lines = [torch.tensor(json.loads(line)) for line in Path("where").read_text().splitlines()]
    gaps = sorted(float(min(torch.linalg.norm(line - one) for one in flat)) for line in lines)
    assert gaps == pytest.approx([0, 0, 1, 1, 1, 1, 4, 4, 4, 4], rel=1e-4, abs=1e-5)


@pytest.mark.usefixtures("here")
class TestCheckpoints:
    def test_names_may_have_a_wrapper_s_prefix_in_one_of_them(self):
        wrapped = {f"module.{name}": value for name, value in load_file(PATHS[0]).items()}
        save_file(wrapped, "ddp.safetensors")
        found = segment([Path("ddp.safetensors"), PATHS[1]], Path("o"), options(), positions=(0, 1))
        for place, path in enumerate(PATHS[:2]):
            wanted = naive(load_file(path))["train loss"]
            assert found.values["train loss"][place] == pytest.approx(wanted)

    @pytest.mark.parametrize("order", [(0, 1), (1, 0)])
    def test_of_unlike_dtypes_have_their_own_losses(self, order):
        half = {
            name: value.bfloat16() if value.is_floating_point() else value
            for name, value in load_file(PATHS[0]).items()
        }
        save_file(half, PATHS[0])
        paths = [PATHS[number] for number in order]
        found = segment(paths, Path("o"), options(), positions=(0, 1))
        for place, path in enumerate(paths):
            wanted = naive(load_file(path))["train loss"]
            assert found.values["train loss"][place] == pytest.approx(wanted, rel=1e-6)

    def test_of_one_name_are_told_apart(self):
        for folder, path in (("a", PATHS[0]), ("b", PATHS[1])):
            Path(folder).mkdir()
            Path(folder, "last.safetensors").write_bytes(path.read_bytes())
        paths = [Path("a/last.safetensors"), Path("b/last.safetensors")]
        found = segment(paths, Path("o"), options(), positions=(0, 1))
        assert found.checkpoints == ("a/last.safetensors", "b/last.safetensors")


@pytest.mark.usefixtures("here")
class TestJournal:
    one: ClassVar[dict[str, Any]] = {"directions": 1, "distances": (0, 1)}

    def test_leaves_the_random_numbers_alone(self):
        state = torch.get_rng_state()
        rays(PATHS[:1], Path("o"), options(), **self.one)
        assert torch.equal(torch.get_rng_state(), state)

    def test_two_runs_at_once_are_told(self, monkeypatch):
        monkeypatch.setattr(temporary, "_LOCK_TIMEOUT", 0.2)
        Path("o").mkdir()
        folder = os.open("o", os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX)
        try:
            with pytest.raises(OutputError, match="another run is using it"):
                rays(PATHS[:1], Path("o"), options(), **self.one)
        finally:
            os.close(folder)

    def test_force_forgets_all_that_is_there(self):
        rays(PATHS[:1], Path("o"), options(), **self.one)
        rays(PATHS[:1], Path("o"), options(refresh=False, force=True), **self.one)
        rays(PATHS[:1], Path("o"), options(refresh=False), **self.one)
        with pytest.raises(OutputError, match="other checkpoints, options or code"):
            rays(PATHS[:1], Path("o"), options(), **self.one)

    def test_force_evaluates_even_what_is_the_same_again(self):
        for times, more in ((5, ()), (5, ()), (10, ("--force",))):
            run(*arguments("rays", PATHS[:1], *COUNTED), *more)
            assert len(Path("log-0").read_text().splitlines()) == times

    def test_a_file_that_is_no_database_is_an_error(self):
        Path("o").mkdir()
        Path("o/points.sqlite").write_text("notes\n" * 100)
        with pytest.raises(OutputError, match=r"points\.sqlite: cannot be used: "):
            rays(PATHS[:1], Path("o"), options(), **self.one)
        rays(PATHS[:1], Path("o"), options(force=True), **self.one)
        rays(PATHS[:1], Path("o"), options(), **self.one)

    def test_a_run_waits_for_one_that_is_about_to_end(self):
        Path("o").mkdir()
        folder = os.open("o", os.O_RDONLY)
        fcntl.flock(folder, fcntl.LOCK_EX)
        threading.Timer(0.3, os.close, (folder,)).start()
        rays(PATHS[:1], Path("o"), options(), **self.one)

    @pytest.mark.parametrize("error", [OSError("closed"), sqlite3.OperationalError("no table")])
    def test_an_error_of_what_hears_of_the_points_is_not_the_journals(self, error):
        def progress(*_):
            raise error

        with pytest.raises(type(error)) as caught:
            rays(PATHS[:1], Path("o"), options(progress=progress), **self.one)
        assert caught.value is error

    def test_what_objects_gave_is_not_taken_for_what_others_give(self):
        space: dict[str, Any] = {}
        exec(SETUP, space)  # noqa: S102
        for force in (False, True):
            objects = EvaluationOptions(model=space["make_model"](), loader=space["loader"]())
            rays(PATHS[:1], Path("o"), ExploreOptions(evaluation=objects, force=force), **self.one)
            with pytest.raises(OutputError, match="other checkpoints, options or code"):
                rays(PATHS[:1], Path("o"), ExploreOptions(evaluation=objects), **self.one)

    def test_other_code_and_other_values_are_another_landscape(self):
        rays(PATHS[:1], Path("o"), options(), **self.one)
        Path("setup.py").write_text(SETUP + "# changed")
        with pytest.raises(OutputError, match="other checkpoints, options or code"):
            rays(PATHS[:1], Path("o"), options(), **self.one)
        Path("setup.py").write_text(SETUP)
        state = load_file(PATHS[0])
        state["4.weight"][2, 20] += 1000
        save_file(state, PATHS[0])
        with pytest.raises(OutputError, match="other checkpoints, options or code"):
            rays(PATHS[:1], Path("o"), options(), **self.one)

    def test_somebody_else_s_files_are_not_replaced(self):
        Path("o").mkdir()
        Path("o/rays.csv").write_text("mine")
        words = arguments("rays", PATHS[:1], "--directions", "1", "--distances", "0,1")
        result = run(*words, code=1)
        assert isinstance(result.exception, OutputError)
        assert Path("o/rays.csv").read_text() == "mine"

    def test_what_cannot_be_drawn_leaves_the_numbers(self, monkeypatch):
        def fail(*_, **__):
            raise ValueError("no")

        monkeypatch.setattr("ckptavg.landscape.plots.draw", fail)
        words = arguments("rays", PATHS[:1], "--directions", "1", "--distances", "0,1")
        result = run(*words)
        assert "cannot be drawn: no" in result.stderr
        assert {path.suffix for path in Path("o").iterdir()} == {".json", ".csv", ".sqlite"}

    def test_names_with_dollars_and_lines_are_drawn(self):
        Path("_a$b^{2$.safetensors").write_bytes(PATHS[0].read_bytes())
        paths = [Path("_a$b^{2$.safetensors"), PATHS[1]]
        words = arguments("rays", paths, "--directions=1", "--distances=0,1", "--metric=loss")
        run(*words)
        assert "_a$b^{2$.safetensors" in Path("o/rays.svg").read_text()
