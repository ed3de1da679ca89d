"""A program in parts: equal layers share code, and the parts together compute what the whole does."""

import json
import zipfile
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from tqdm.auto import tqdm

from tests.kernels import HAS_COMPILER, NO_COMPILER
from transformers_resps.compilation import packages as packages_module
from transformers_resps.compilation.compiled import CompiledFunction
from transformers_resps.compilation.packages import FOLDER_VARIABLE, ModulePackages, stored_packages
from transformers_resps.compilation.parts import ProgramPart, UncuttableError, exported_part, parts_of


class Layer(nn.Module):
    def __init__(self, width: int = 32, *, is_wide: bool = False) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(width, (2 + is_wide) * width), nn.Linear((2 + is_wide) * width, width)

    def forward(self, states: Tensor, scale: Tensor, kept: Tensor, count: int) -> Tensor:
        kept[:, : states.shape[1]] = states
        return states + self.down(torch.relu(self.up(states * scale))) + kept[:, :count].mean()


class Decoder(nn.Module):
    """`wide` are the layers of another kind."""

    def __init__(self, count: int = 5, wide: tuple[int, ...] = ()) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embed, self.norm = nn.Embedding(11, 32), nn.LayerNorm(32)
        self.layers = nn.ModuleList(Layer(is_wide=number in wide) for number in range(count))
        self.requires_grad_(False)

    def forward(self, tokens: Tensor, scales: Tensor, *kept: Tensor) -> tuple[Tensor, ...]:
        states, scale = self.embed(tokens), scales.mean(-1, keepdim=True)
        hidden = [states]
        for layer, own in zip(self.layers, kept, strict=True):
            states = layer(states, scale, own, scales.shape[2])
            hidden.append(states)
        return self.norm(states), hidden[2]


WEIGHTS = [name for name, _ in Decoder().named_parameters()]


def inputs_of(decoder: Decoder, rows: int = 2, width: int = 5) -> tuple[Tensor, ...]:
    torch.manual_seed(1)
    kept = [torch.zeros(rows, 17, 32) for _ in decoder.layers]
    return torch.randint(0, 11, (rows, width)), torch.rand(rows, width, 7), *kept


def program_of(decoder: Decoder) -> ExportedProgram:
    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.module = decoder

        def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:
            return self.module(*tensors)

    inputs = inputs_of(decoder)
    sizes = tuple({place: Dim.DYNAMIC for place in range(1, 3 if part.dim() == 3 else 2)} for part in inputs[:2])
    return torch.export.export(Wrapped(), inputs, dynamic_shapes=((*sizes, *({} for _ in inputs[2:])),), strict=False)


@pytest.mark.parametrize(("wide", "codes"), [((), 3), ((1,), 4), ((0, 2), 4)], ids=str)
def test_equal_layers_are_alike_and_others_are_not(wide: tuple[int, ...], codes: int) -> None:
    parts = parts_of(program_of(Decoder(wide=wide)))
    assert len(parts) == 7 and len({part.likeness for part in parts}) == codes
    assert [len(part.weights) for part in parts] == [1, 4, 4, 4, 4, 4, 2]


@pytest.mark.parametrize(
    ("count", "wide", "layers"),
    [(9, (), [3, 3, 3]), (8, (), [2, 2, 2, 2]), (7, (0,), [1, 2, 2, 2]), (7, (), [1] * 7), (7, (3,), [1] * 7)],
    ids=str,
)
def test_equal_layers_that_follow_one_another_become_parts_together(
    count: int, wide: tuple[int, ...], layers: list[int]
) -> None:
    """Whichever states the program returns: here those after the second layer."""
    parts = parts_of(program_of(Decoder(count, wide=wide)), together=4)
    assert [len(part.weights) for part in parts] == [1, *(4 * size for size in layers), 2]
    assert len({part.likeness for part in parts}) == 3 + len(wide)


@torch.no_grad()
@pytest.mark.parametrize(("width", "wide", "together"), [(3, 3, 1), (5, 3, 1), (9, 3, 1), (3, 0, 2), (9, 0, 2)])
def test_the_parts_one_after_the_other_are_the_whole(width: int, wide: int, together: int) -> None:
    decoder = Decoder(7, wide=(wide,))
    program = program_of(decoder)
    inputs, expected = (inputs_of(decoder, width=width) for _ in range(2))
    names = program.graph_signature.user_inputs
    values = dict(zip(names, inputs, strict=True))
    for part in parts_of(program, together):
        made = exported_part(program, part).module()(*(values[node.name] for node in part.inputs))
        values |= {node.name: value for node, value in zip(part.outputs, made, strict=True)}
    outputs = [values[name] for name in program.graph_signature.user_outputs]
    torch.testing.assert_close(outputs, list(decoder(*expected)))
    torch.testing.assert_close(inputs[2:], expected[2:])


def test_what_has_no_equal_layers_is_not_cut() -> None:
    with pytest.raises(UncuttableError, match="no layers are equal"):
        parts_of(program_of(Decoder(2)))
    with pytest.raises(UncuttableError, match="no list of layers"):
        parts_of(torch.export.export(nn.Linear(3, 2), (torch.rand(2, 3),)))


@torch.no_grad()
def test_what_turns_out_not_to_be_cut_is_compiled_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Code of the parts before is not kept. A compiler is planted, which writes what it was given."""
    traced: list[ProgramPart] = []

    def fails_at_the_second(program: ExportedProgram, part: ProgramPart) -> ExportedProgram:
        traced.append(part)
        if len(traced) == 2:
            raise UncuttableError("planted")
        return exported_part(program, part)

    def write(writer: Any, program: ExportedProgram, weights: Any, archive: Any, number: int) -> Any:
        archive.writestr(f"{number}/{len(weights)} weights", "")
        return {}, []

    monkeypatch.setattr(packages_module, "exported_part", fails_at_the_second)
    monkeypatch.setattr(packages_module._Writer, "write_code", write)
    decoder, sizes = Decoder(), [(1,), (1, 2), *[()] * 5]
    inputs = inputs_of(decoder)
    job = packages_module.CompileJob(lambda *tensors: decoder(*tensors), inputs, sizes, {}, alike=False)
    made = packages_module._compile(decoder, job, tmp_path / "code.pt2", tqdm())
    assert made["calls"] == [{"code": 0, "inputs": [*range(7)], "weights": {name: name for name in WEIGHTS}}]
    assert made["outputs"] == [7, 8]
    with zipfile.ZipFile(tmp_path / "code.pt2") as archive:
        assert archive.namelist() == ["0/23 weights"]


@torch.no_grad()
@pytest.mark.skipif(not HAS_COMPILER, reason=NO_COMPILER)
def test_a_package_holds_the_code_of_equal_layers_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A bar moves when the program is traced, and with each piece of code."""
    bars: list[Any] = []

    def bar(**options: Any) -> Any:
        bars.append(tqdm(**(options | {"file": StringIO(), "disable": False})))
        return bars[-1]

    monkeypatch.setattr(packages_module, "tqdm", bar)
    monkeypatch.setenv(FOLDER_VARIABLE, str(tmp_path))
    decoder = Decoder()
    for _ in range(2):  # compiled, then loaded
        packages = ModulePackages(lambda: decoder, "the decoder")
        compiled = CompiledFunction(
            lambda *tensors: decoder(*tensors), [(1,), (1, 2)], (), packages=packages, name="decoder"
        )
        for width in (5, 9):
            inputs, expected = (inputs_of(decoder, width=width) for _ in range(2))
            outputs = decoder(*expected)
            if width == 5:
                compiled.load(inputs[:2], inputs[2:], outputs)
            torch.testing.assert_close(compiled(inputs[:2], inputs[2:]), outputs)
            torch.testing.assert_close(inputs[2:], expected[2:])
    (package,) = stored_packages(tmp_path)
    manifest = json.loads((package.path / "package.json").read_text())
    assert (len(manifest["codes"]), len(manifest["calls"])) == (3, 7)
    (one,) = bars
    assert (one.desc, one.n, one.total) == ("Compiling the decoder", 4, 4)
