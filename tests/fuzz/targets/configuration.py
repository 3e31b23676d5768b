"""The configuration: a file, and variables that are laid over it (pdp.config)."""

from __future__ import annotations

import atexit
import json
import shutil
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Final

import yaml

from pdp.canonical import JsonObject
from pdp.config import Config, ConfigError, load_config
from tests.fuzz.choices import Choices, edited, edited_bytes
from tests.fuzz.contract import refuses

SPACE: Final = Path(tempfile.mkdtemp(prefix="fuzz-config-"))
atexit.register(shutil.rmtree, SPACE, ignore_errors=True)
SAMPLE: Final[JsonObject] = {
    "state_dir": "state",
    "listen": {"tcp": {"address": "127.0.0.1:50051"}, "unix": "pdp.sock"},
    "identity": {
        "mode": "jwt",
        "issuers": [
            {
                "issuer": "https://id.example",
                "audiences": ["agent-service"],
                "jwks_file": "jwks.json",
                "tenant": {"claim": "tenant_id"},
            }
        ],
    },
    "policy": {"bundles": {"main": {"path": "bundle.tar.gz"}}},
    "budget": {"store": {"addresses": ["127.0.0.1:6379"], "password_file": "p"}},
    "audit": {"record_policy_input": True},
    "permit": {"ttl_seconds": 60},
}
TEXT: Final = yaml.safe_dump(SAMPLE).encode()
VARIABLES: Final = (
    "PDP_STATE_DIR", "PDP_LISTEN__TCP", "PDP_LISTEN", "PDP_BUDGET__STORE__URL", "PDP_", "PDP___",
    "PDP_A__B__C", "PDP_IDENTITY__JWT", "PDP_POLICY__BUNDLES__MAIN__PATH", "PDP_PORT", "PDP_PDP",
)  # fmt: skip


def samples() -> Iterable[bytes]:
    yield b"\0\0" + TEXT
    yield b"\1\0"
    yield b"\2\0"
    yield b"\1\1\0\6/state"


def one_input(data: bytes) -> bool:
    choices = Choices(data)
    kind = choices.number(4)
    environment = {
        choices.pick(VARIABLES): choices.text().replace("\0", "") for _ in range(choices.number(3))
    }
    if kind == 0:
        text = choices.rest()
    elif kind == 1:
        text = json.dumps(edited(SAMPLE, choices)).encode("utf-8", "surrogatepass")
    else:
        text = edited_bytes(TEXT, choices)
    path = SPACE / "pdp.yaml"
    path.write_bytes(text)
    config = refuses(lambda: load_config(path, environment), ConfigError)
    if config is None:
        return False
    assert isinstance(config, Config)
    assert load_config(path, environment) == config
    return True
