"""Models by their name on the Hugging Face Hub: org/name, fetched once and pinned to a revision.

    path, name = fetch("HuggingFaceTB/SmolLM2-135M")               # a folder in huggingface_hub's cache
    path, name = fetch("HuggingFaceTB/SmolLM2-135M@12fd25f7")      # the same at a revision
    path, name = fetch("org/name-GGUF/name-Q4_K_M.gguf")           # one file

Only what is read here is fetched: config, tokenizer and safetensors; no code and no pickles.
"""
import re
import sys
from pathlib import Path

from thimble.files import UserError, need, short

PATTERNS = ["config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
            "special_tokens_map.json", "model.safetensors", "model-*-of-*.safetensors", "model.safetensors.index.json"]
NAME = re.compile(r"([A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*)(?:/([\w./-]+\.gguf))?(?:@([\w./-]+))?", re.ASCII)
OURS = ("runs", "exports", "packed", "data", "config")  # folders of which a part may be mistyped, or not be there yet


def is_name(path):
    """Whether `path` can only be the name of a model on the Hub: nothing here is called so."""
    match = NAME.fullmatch(str(path))
    if not match or Path(path).exists():
        return False
    first = str(path).partition("/")[0]
    return first not in OURS and not Path(first).exists()


def fetch(name, hub=None):
    """(folder or GGUF file, "org/name@revision") of a model on the Hub; UserError if it cannot be had.

    hub: what stands for the package huggingface_hub.
    """
    repo, file, revision = NAME.fullmatch(str(name)).groups()
    hub = hub or need("huggingface_hub", f"{name} is not a path here, and to fetch it from the Hugging Face Hub")
    try:
        # a branch may move: all files are of the commit that it stands for now
        sha = hub.HfApi().model_info(repo, revision=revision, timeout=10).sha
        offline = False
    except Exception as error:  # of many kinds
        why = short(error, 150)
        sha = revision or "main"
        offline = True
    try:
        if file:
            path = hub.hf_hub_download(repo, file, revision=sha, local_files_only=offline)
        else:
            path = hub.snapshot_download(repo, revision=sha, allow_patterns=PATTERNS, local_files_only=offline)
    except Exception as error:
        why = why if offline else short(error, 150)
        raise UserError(f"{name} is not a path here, and the Hugging Face Hub does not give it ({why}): check the name "
                        "and the network, or download it and name the folder") from None
    path = Path(path)
    if offline:  # as the cache calls it
        sha = path.parts[path.parts.index("snapshots") + 1] if "snapshots" in path.parts else sha
    pinned = f"{repo}{'/' + file if file else ''}@{sha}"
    print(f"{pinned} from the Hugging Face Hub{' (cached)' if offline else ''}", file=sys.stderr)
    return path, pinned
