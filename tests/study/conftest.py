"""The tiny preset as a setting."""

from pathlib import Path

import pytest
import tiny_preset
from shared import sae_at

from blockem_tl import Setting
from blockem_tl.presets import PRESETS
from blockem_tl.study.inputs import INPUTS


@pytest.fixture(scope="session")
def sae_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sae")
    sae_at(tiny_preset.SITE).save_model(folder)
    return folder


@pytest.fixture
def setting(tiny_folder: Path, sae_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Setting:
    monkeypatch.setitem(INPUTS, tiny_preset.NAME, tiny_preset.TinyInputs())
    monkeypatch.setitem(PRESETS, tiny_preset.NAME, tiny_preset.preset(tiny_folder, sae_folder))
    return Setting.of(tiny_preset.NAME)
