"""The polkit rule that lets a steerd that is not root start and stop the units of its configuration, and no others."""

from __future__ import annotations

import json

from steerd.config import Config

_RULE = """\
// Made by `steerd polkit-rule`, from {file}. Belongs into /etc/polkit-1/rules.d/50-steerd.rules.
polkit.addRule(function (action, subject) {{
    var units = [
{units}
    ];
    if (action.id !== "org.freedesktop.systemd1.manage-units" || subject.user !== {user})
        return polkit.Result.NOT_HANDLED;
    var unit = action.lookup("unit"), verb = action.lookup("verb");
    if ((verb === "start" || verb === "stop") && units.some(function (each) {{ return each.test(unit); }}))
        return polkit.Result.YES;
    return polkit.Result.NOT_HANDLED;
}});
"""


def rule(config: Config, user: str) -> str:
    """The text of the rule; empty if the configuration names no unit to wake. `user`: as whom steerd runs."""
    patterns = sorted({wake.unit_pattern() for wake in config.all_wakes.values() if wake.unit})
    if not patterns:
        return ""
    # A / in a pattern would end it; a unit's name has none.
    units = ",\n".join(f"        /{pattern}/" for pattern in patterns)
    return _RULE.format(file=json.dumps(config.file), units=units, user=json.dumps(user))
