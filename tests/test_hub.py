"""Models by their name on the Hugging Face Hub: what is asked for and pinned, and what is said without a network."""
import socket
import types

import pytest
from cases import out

import sample
from thimble import hub, load
from thimble.files import UserError

pytestmark = pytest.mark.usefixtures("lean")

SHA = "0123456789abcdef0123456789abcdef01234567"


class Fake:
    """A huggingface_hub that holds one model, a folder; without a network it has what was fetched before."""

    def __init__(self, cache, online=True, cached=True):
        self.cache = cache / "models--org--tiny" / "snapshots" / SHA
        self.online = online
        self.cached = cached
        self.asked = []

    def HfApi(self):
        return self

    def model_info(self, repo, revision, timeout):
        if not self.online:
            raise OSError("Name or service not known")
        assert repo == "org/tiny" and revision in (None, "v1", SHA)
        return types.SimpleNamespace(sha=SHA)

    def snapshot_download(self, repo, revision, allow_patterns, local_files_only):
        self.asked.append((repo, revision, tuple(allow_patterns)))
        if local_files_only and not self.cached:
            raise FileNotFoundError("nothing in the cache")
        return str(self.cache)

    def hf_hub_download(self, repo, file, revision, local_files_only):
        self.asked.append((repo, revision, file))
        return str(self.cache / file)


@pytest.fixture
def fake(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    there = Fake(tmp_path / "cache")
    there.cache.parent.mkdir(parents=True)
    out("qwen3", there.cache, "hf", check=False)
    out("qwen3", there.cache / "tiny-Q8_0.gguf", "gguf", check=False)
    monkeypatch.setattr(hub, "need", lambda package, what: there)
    return there


def test_what_is_a_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("org/tiny", "org/tiny@v1", "Qwen/Qwen3-0.6B", f"org/tiny@{SHA}", "org/tiny-GGUF/sub/tiny.Q4_K_M.gguf"):
        assert hub.is_name(name), name
    (tmp_path / "models").mkdir()
    for path in ("", "tiny", "runs/tiny", "exports/tiny", "models/tiny", "a/b/c", "../a/b", "/a/b", "./a", "org/t.py/x",
                 "~/a", "a b/c", "org/tiny@"):
        assert not hub.is_name(path), path


def test_a_name_is_fetched_and_pinned(fake, capsys):
    loaded = load.load("org/tiny")
    assert loaded.name == "tiny" and loaded.meta["hub"] == f"org/tiny@{SHA}" and loaded.meta["arch"] == "model"
    repo, revision, patterns = fake.asked[0]
    assert (repo, revision) == ("org/tiny", SHA)
    assert not [pattern for pattern in patterns if pattern.endswith((".py", ".bin", ".pt")) or pattern.startswith("*")]
    said = capsys.readouterr().err
    assert said.count("\n") == 1 and f"org/tiny@{SHA} from the Hugging Face Hub" in said
    assert load.load("org/tiny/tiny-Q8_0.gguf@v1").name == "tiny-Q8_0"
    assert load.read_tokenizer("org/tiny").encode("The") == loaded.tokenizer.encode("The")
    sample.main(sample.Config(checkpoint="org/tiny", prompt="The", max_new_tokens=3))


def test_without_a_network_the_cache_serves_or_one_line_says_so(fake, capsys):
    fake.online = False
    assert load.load("org/tiny").meta["hub"] == f"org/tiny@{SHA}"
    assert "(cached)" in capsys.readouterr().err
    fake.cached = False
    with pytest.raises(UserError, match=r"org/tiny is not a path here.*Name or service not known.*name the folder"):
        load.load("org/tiny")


def test_the_package_itself_without_a_network(tmp_path, monkeypatch):
    pytest.importorskip("huggingface_hub", reason="pip install -r requirements-test.txt")
    monkeypatch.chdir(tmp_path)

    def unreachable(*args, **options):
        raise socket.gaierror(-2, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unreachable)
    with pytest.raises(UserError, match="the Hugging Face Hub does not give it"):
        load.load("nobody/has-this-model")


def test_a_run_says_the_revision_that_it_started_from(fake, monkeypatch):
    import train
    from prepare.text import prepare
    from thimble import checkpoint, configurator
    here = fake.cache.parents[3]
    prepare(lambda: iter(["the cat sat on the mat. " * 99]), "mine", "tests", "org/tiny", data_dir=here)
    argv = ["--dataset=mine", "--init_from=org/tiny@v1", "--max_steps=1", "--eval_every=1", "--batch_size=2",
            "--device=cpu", "--dtype=float32", "--out_dir=tuned"]
    fake.asked.clear()
    train.main(*configurator.parse(train.Config, argv))
    assert len(fake.asked) == 1
    assert checkpoint.load("tuned").meta["config"]["init_from"] == f"org/tiny@{SHA}"


def test_an_adapter_is_no_model(tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    (tmp_path / "adapter_model.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match="is an adapter.*merge_and_unload"):
        load.read(tmp_path)
