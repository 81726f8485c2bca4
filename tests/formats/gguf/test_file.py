"""Our reader of GGUF files against the gguf package's, and what it makes of damaged ones."""

from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minilora.errors import InputError
from minilora.formats.gguf.file import GGUFFile

TYPES = ["F32", "F16", "BF16", "Q8_0", "Q4_0", "Q4_1", "Q5_0", "Q5_1"]


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One tensor of every type that the gguf package can write, of an odd number of rows."""
    path = tmp_path_factory.mktemp("gguf") / "all.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_uint8("u8", 200)
    writer.add_int8("i8", -5)
    writer.add_uint16("u16", 60000)
    writer.add_int16("i16", -300)
    writer.add_int32("i32", -70000)
    writer.add_uint64("u64", 2**63)
    writer.add_int64("i64", -(2**40))
    writer.add_float64("f64", 0.1)
    writer.add_bool("bool", True)
    writer.add_array("nested", [["a"], ["b", "c"]])
    writer.add_array("texts", ["a", "", "中"])
    writer.add_array("integers", [1, -2, 3])
    writer.add_array("numbers", [0.5, 1.5])
    writer.add_array("flags", [True, False])
    writer.add_string("text", "wörd\n")
    w = np.random.default_rng(0).normal(size=(5, 64)).astype(np.float32)
    for kind in TYPES:
        number = gguf.GGMLQuantizationType[kind]
        writer.add_tensor(f"{kind}.weight", gguf.quantize(w, number), raw_dtype=number)
    writer.add_tensor("vector.bias", w[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def test_metadata_is_the_gguf_packages(file: Path) -> None:
    ours, theirs = GGUFFile(file).metadata, gguf.GGUFReader(file).fields
    expected = {key: field.contents() for key, field in theirs.items() if not key.startswith("GGUF.")}
    nested = {"nested": [["a"], ["b", "c"]]}  # which the package's own contents() cannot give
    assert ours | nested == expected | nested
    assert ours["nested"] == nested["nested"]


@pytest.mark.parametrize("kind", [*TYPES, "vector"])
def test_tensors_are_the_gguf_packages(file: Path, kind: str) -> None:
    tensor = next(t for t in gguf.GGUFReader(file).tensors if t.name.startswith(kind))
    expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))
    ours = GGUFFile(file).read(tensor.name)
    assert ours.is_floating_point()
    assert tuple(ours.shape) == GGUFFile(file).tensors[tensor.name].shape
    assert torch.equal(ours.float(), expected.view(ours.shape))


@settings(deadline=None, max_examples=60)
@given(data=st.data())
def test_a_damaged_file_is_an_input_error_that_names_it(file: Path, data: st.DataObject) -> None:
    content = file.read_bytes()
    header = 700  # the metadata and some of the tensors' entries
    broken = bytearray(content)
    if data.draw(st.booleans(), label="truncate"):
        del broken[data.draw(st.integers(0, len(content) - 1), label="length") :]
    else:
        for _ in range(data.draw(st.integers(1, 4))):
            broken[data.draw(st.integers(0, header))] = data.draw(st.integers(0, 255))
    path = file.parent / "broken.gguf"
    path.write_bytes(broken)
    try:
        opened = GGUFFile(path)
        for name in opened.tensors:
            opened.read(name)
    except InputError as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_truncation_names_the_first_tensor_that_is_cut(file: Path) -> None:
    path = file.parent / "short.gguf"
    path.write_bytes(file.read_bytes()[:-40])
    short = GGUFFile(path)
    short.read("F32.weight")
    with pytest.raises(
        InputError, match=r"short\.gguf is truncated: tensor vector\.bias ends at byte \d+, the file at"
    ):
        short.read("vector.bias")


def test_what_is_not_gguf_and_what_is_too_new(file: Path) -> None:
    other = file.parent / "other.gguf"
    other.write_bytes(b"PK\x03\x04" + bytes(100))
    with pytest.raises(InputError, match="is not a GGUF file: it does not begin with the letters GGUF"):
        GGUFFile(other)
    other.write_bytes(b"GGUF" + (9).to_bytes(4, "little") + file.read_bytes()[8:])
    with pytest.raises(InputError, match="GGUF version 9 is not supported; supported are 2 and 3"):
        GGUFFile(other)


def test_a_tensor_of_a_type_without_code_is_named(tmp_path: Path) -> None:
    path = tmp_path / "type.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    raw = np.zeros((2, 64), dtype=np.int32)
    writer.add_tensor("ints.weight", raw)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(InputError, match=r"tensor ints\.weight is of type I32"):
        GGUFFile(path).read("ints.weight")
