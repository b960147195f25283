"""The agents, and what each needs to be at home without a network: files in its HOME, variables,
and the endpoint for a model."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Agent:
    """``recipe``: kind and name of its runner in docs/agents.md; ``program``: what it has instead
    of that runner's command. ``settle(home, url)`` writes its files and gives its variables."""

    name: str
    package: str
    recipe: tuple[str, str]
    settle: Callable[[Path, str], Mapping[str, str]]
    program: tuple[str, ...] = ()


def _settle_claude(home: Path, url: str) -> Mapping[str, str]:
    return {
        "ANTHROPIC_BASE_URL": url,
        "ANTHROPIC_API_KEY": "loopback",
        "CLAUDE_CODE_DISABLE_NONESSENTIAL_TRAFFIC": "1",
        "DISABLE_AUTOUPDATER": "1",
        "DISABLE_TELEMETRY": "1",
    }


def _settle_codex(home: Path, url: str) -> Mapping[str, str]:
    folder = home / ".codex"
    folder.mkdir()
    (folder / "config.toml").write_text(
        'model = "loopback"\nmodel_provider = "loopback"\n'
        "check_for_update_on_startup = false\n"
        "[analytics]\nenabled = false\n"
        '[model_providers.loopback]\nname = "loopback"\nwire_api = "responses"\n'
        f'base_url = "{url}/v1"\nenv_key = "LOOPBACK_KEY"\n'
    )
    return {"LOOPBACK_KEY": "loopback"}


def _settle_opencode(home: Path, url: str) -> Mapping[str, str]:
    folder = home / ".config/opencode"
    folder.mkdir(parents=True)
    provider = {
        "npm": "@ai-sdk/openai-compatible",
        "name": "loopback",
        "options": {"baseURL": f"{url}/v1", "apiKey": "loopback"},
        "models": {"loopback": {"name": "loopback", "tool_call": True}},
    }
    settings = {
        "model": "loopback/loopback",
        "small_model": "loopback/loopback",
        "provider": {"loopback": provider},
        "autoupdate": False,
        "share": "disabled",
        "permission": "allow",
    }
    (folder / "opencode.json").write_text(json.dumps(settings))
    names = ("AUTOUPDATE", "MODELS_FETCH", "LSP_DOWNLOAD", "DEFAULT_PLUGINS")
    return {f"OPENCODE_DISABLE_{name}": "true" for name in names}


CAST = {
    x.name: x
    for x in (
        Agent("claude", "@anthropic-ai/claude-code", ("command", "claude"), _settle_claude),
        Agent("codex", "@openai/codex", ("command", "codex"), _settle_codex),
        Agent("opencode", "opencode-ai", ("command", "opencode"), _settle_opencode),
        Agent(
            "claude-agent-acp",
            "@zed-industries/claude-agent-acp",
            ("acp", "opencode"),
            _settle_claude,
            ("claude-agent-acp",),
        ),
        Agent("opencode-acp", "opencode-ai", ("acp", "opencode"), _settle_opencode),
    )
}
