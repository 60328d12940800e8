"""Models and tokenizers by registered name, hub id or folder."""

from __future__ import annotations

import logging
from functools import cache
from pathlib import Path

import torch
from tokenizers import Tokenizer

from model.config import Gemma4Config
from model.errors import ConfigError, UserError, nearest
from model.gemma4 import Gemma4
from model.hf.weights import Weights, WeightsError
from model.init import whole_slices
from model.variants import HUB_IDS

log = logging.getLogger("gemwright")

_WANTED_FILES = ("*.json", "*.safetensors", "*.jinja", "tokenizer.model")


def resolve(source: str) -> Path:
    """Folder of a checkpoint: a folder as it is, or the local copy of a hub id or registered name, fetched if need be.

    Raises `WeightsError` when it is neither, or the hub cannot be reached and nothing is cached.
    """
    folder = Path(source).expanduser()
    if folder.is_dir():
        return _model_in(folder)
    hub_id = HUB_IDS.get(source, source)
    if hub_id.count("/") != 1 or source.startswith((".", "/", "~")):
        near = nearest(source, HUB_IDS)
        raise WeightsError(
            f"weights {source} is neither a folder nor a hub id such as google/gemma-4-E4B; nearest name: {near}."
        )
    return _fetched(hub_id)


def _model_in(folder: Path) -> Path:
    """A folder of weights itself, or the newest export of a run's folder. Raises `WeightsError` for other kinds."""
    if (folder / "config.json").is_file():
        return folder
    if (folder / "adapter_config.json").is_file():
        raise WeightsError(
            f"{folder} holds an adapter, not a model; merge it into its model first, and give that folder."
        )
    if (folder / "state.json").is_file():
        raise WeightsError(
            f"{folder} is a checkpoint of a run; go on from it with run.resume={folder}, or export it: "
            f"gemwright export run={folder.parent.parent} checkpoint={folder.name} out=FOLDER."
        )
    if (folder / "checkpoints").is_dir():
        exports = sorted(path.parent for path in folder.glob("export/step_*/gemwright_export.json"))
        if not exports:
            raise WeightsError(
                f"{folder} is a run without an export; make one: gemwright export run={folder} out=FOLDER."
            )
        log.info("%s is a run; its newest export is %s", folder, exports[-1])
        return exports[-1]
    return folder


@cache
def _fetched(hub_id: str) -> Path:
    from huggingface_hub import snapshot_download  # imports slowly, so only when asked for
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        return Path(snapshot_download(hub_id, allow_patterns=list(_WANTED_FILES)))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise WeightsError(
            f"{hub_id} could not be fetched from the hub ({reason}); "
            "log in and accept its licence, or give a folder that holds it."
        ) from None


def load_model(source: str | Path, *, dtype: torch.dtype = torch.float32, device: torch.device | str = "cpu") -> Gemma4:
    """A model on one device with its weights, e.g. `load_model("gemma4_e4b")` or a folder.

    Buffers keep float32. Raises `WeightsError` or `ConfigError`.
    """
    folder = resolve(str(source))
    config = Gemma4Config.from_hf(folder)
    weights = Weights(folder, config)
    with torch.device("meta"):
        model = Gemma4(config)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.to_empty(device=device)
    weights.fill(whole_slices(model))
    return model.eval()


def load_tokenizer(source: str | Path) -> Tokenizer:
    """The `tokenizers.Tokenizer` of a folder, hub id, registered name, or a `tokenizer.json`.

    It gives every token of a text, always the same ones: settings for truncation, padding and dropout, which a file
    may hold from its last use, are switched off.
    """
    path = Path(source).expanduser()
    if not path.is_file():
        path = resolve(str(source)) / "tokenizer.json"
    if not path.is_file():
        raise ConfigError(f"{path} does not exist; give a folder with a tokenizer.json.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exception on any damage
        raise UserError(f"{path} cannot be read ({error}); fetch it again.") from None
    left = [name for name in ("truncation", "padding") if getattr(tokenizer, name) is not None]
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, "dropout", None):
        left.append("dropout")
        tokenizer.model.dropout = None
    if left:
        log.warning("%s holds settings for %s, which are switched off", path, " and ".join(left))
    return tokenizer
