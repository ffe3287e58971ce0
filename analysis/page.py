"""Pages: a template with figures as one self-contained HTML file, whose text cannot become markup."""

import json
from pathlib import Path
from typing import Any


def render(template: str, where: str | Path, /, **contents: Any) -> Path:
    """Writes a page that holds plotly.js once (about 5 MB) and asks nobody for anything.

    Text is escaped by the template. `figures` and other values of `contents` that are dictionaries or lists
    under a name in capitals become JSON that cannot close its script.

    Raises:
        OSError: if the file cannot be written.
    """
    from jinja2 import Environment, PackageLoader, StrictUndefined
    from markupsafe import Markup
    from plotly.offline import get_plotlyjs

    env = Environment(
        loader=PackageLoader("peftscape.analysis", "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    scripts = ("figures", "hovers", "extras")
    safe = {name: Markup(script_json(value)) if name in scripts else value for name, value in contents.items()}
    # plotly's own code; nothing of a record is in it
    text = env.get_template(template).render(plotly=Markup(get_plotlyjs()), **safe)
    target = Path(where)
    target.parent.mkdir(parents=True, exist_ok=True)
    # Written beside and moved, so that an interrupted report never replaces a whole one.
    beside = target.with_name(target.name + ".part")
    beside.write_text(text, encoding="utf-8")
    return beside.replace(target)


def script_json(value: Any) -> str:
    """JSON that is safe inside <script>: no `<` is left, so that no text can close the element."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace("\u2028", "\\u2028").replace("\u2029", "\\u2029")
