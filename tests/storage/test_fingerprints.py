"""Hashes of weights are taken once, and never of other weights than those that are there."""

import hashlib
import os
import time

import pytest
import torch
from shared import sae_at

from blockem_tl.storage import fingerprints


def plainly(tensors) -> str:
    """The hash as it has always been, so that what lies on disk stays valid."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}{tuple(tensor.shape)}{tensor.dtype}".encode())
        digest.update(tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def weights() -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    whole = torch.randn(3000)
    return {
        "matrix": torch.randn(700, 33),
        "half": torch.randn(4099).bfloat16(),
        "odd": whole[1:1002],
        "bytes": torch.arange(13, dtype=torch.uint8),
        "flags": torch.tensor([True, False, True]),
        "scalar": torch.tensor(2.5),
        "empty": torch.zeros(0),
        "turned": torch.randn(20, 30).T,
    }


def test_the_hash_is_what_it_was() -> None:
    tensors = weights()
    assert fingerprints.of_tensors(tensors) == plainly(tensors) == fingerprints.of_tensors(tensors)


def test_it_is_taken_once(monkeypatch) -> None:
    tensors, taken = weights(), []
    sha256 = hashlib.sha256
    fingerprints.of_tensors(tensors)
    monkeypatch.setattr(fingerprints, "of_vector", lambda tensor: taken.append(1) or b"")
    sae = sae_at("blocks.1.hook_resid_post")
    first, again = fingerprints.of_sae(sae), fingerprints.of_sae(sae)
    assert first == again and len(taken) == len(sae.state_dict())
    sae.W_dec.data[0, 0] += 1
    fingerprints.of_sae(sae)
    assert len(taken) == 2 * len(sae.state_dict())
    sae.cfg.metadata.hook_name, sae.cfg.reshape_activations = "other", "hook_z"
    fingerprints.of_sae(sae)
    assert len(taken) == 3 * len(sae.state_dict()) and hashlib.sha256 is sha256


@pytest.mark.parametrize("name", ["matrix", "half", "odd", "bytes", "flags", "scalar", "turned"])
def test_every_edit_is_noticed(name) -> None:
    """Also one of a single value through .data, which torch does not count, at the beginning, in the middle and at the end."""
    tensors = weights()
    seen = {fingerprints.of_tensors(tensors)}
    numbers = tensors[name].data.view(-1) if tensors[name].is_contiguous() else tensors[name].data.T.view(-1)
    for place in sorted({0, len(numbers) // 2, len(numbers) - 1}):
        version = tensors[name]._version
        numbers[place] = ~numbers[place] if numbers.dtype == torch.bool else numbers[place] + 1
        assert tensors[name]._version == version
        found = fingerprints.of_tensors(tensors)
        assert found == plainly(tensors) and found not in seen
        seen.add(found)


def test_values_that_change_places_are_noticed() -> None:
    tensors = {"bias": torch.arange(12.0), "matrix": torch.arange(4096.0).view(64, 64)}
    before = fingerprints.of_tensors(tensors)
    tensors["bias"].data[[2, 9]] = tensors["bias"].data[[9, 2]]
    between = fingerprints.of_tensors(tensors)
    tensors["matrix"].data[[3, 4]] = tensors["matrix"].data[[4, 3]]
    assert len({before, between, fingerprints.of_tensors(tensors)}) == 3


def test_few_are_remembered() -> None:
    for n in range(100):
        fingerprints.of_tensors({"x": torch.full((5,), float(n))})
    assert len(fingerprints._hashes) <= 32


def counted(monkeypatch) -> list[str]:
    """Files that are opened from now on."""
    opened, plain = [], fingerprints.Path.open
    monkeypatch.setattr(fingerprints.Path, "open", lambda path, *args, **named: opened.append(path.name) or plain(path, *args, **named))
    return opened


def test_a_file_is_read_once_as_long_as_it_is_the_same(tmp_path, monkeypatch) -> None:
    path, opened = tmp_path / "weights.safetensors", counted(monkeypatch)
    path.write_bytes(b"one")
    opened.clear()
    past = time.time() - 60
    os.utime(path, (past, past))
    first = [fingerprints.of_file(path), fingerprints.of_folder(tmp_path)]
    assert first == [fingerprints.of_file(path), fingerprints.of_folder(tmp_path)]
    assert opened == [path.name] * 2 and first[0] == hashlib.sha256(b"one").hexdigest()
    path.write_bytes(b"two")
    os.utime(path, (past, past))  # of the same size and time, but the inode was changed since
    assert fingerprints.of_file(path) == hashlib.sha256(b"two").hexdigest() and fingerprints.of_folder(tmp_path) != first[1]


def test_a_file_of_this_moment_is_read_again(tmp_path, monkeypatch) -> None:
    """Written twice within a tick of the clock it would have the same time and size."""
    path, opened = tmp_path / "weights.safetensors", counted(monkeypatch)
    for content in (b"one", b"two"):
        path.write_bytes(content)
        assert fingerprints.of_file(path) == hashlib.sha256(content).hexdigest()
    assert fingerprints.of_file(path) and opened.count(path.name) == 5


def test_a_folder_that_gains_a_file_is_another(tmp_path) -> None:
    past = time.time() - 60
    (tmp_path / "a.json").write_text("{}")
    os.utime(tmp_path / "a.json", (past, past))
    before = fingerprints.of_folder(tmp_path)
    (tmp_path / "b.json").write_text("{}")
    os.utime(tmp_path / "b.json", (past, past))
    assert fingerprints.of_folder(tmp_path) != before
