"""The notebooks of `examples/` as pages: text, code, and the output that is stored with them."""

import base64
import json
from pathlib import Path

from mkdocs.exceptions import PluginError
from repository import ROOT


def pages() -> tuple[dict[str, str], dict[str, bytes]]:
    """Source path of each page -> its Markdown; of each picture -> its bytes."""
    texts, pictures = {}, {}
    for path in sorted((ROOT / "examples").glob("*.ipynb")):
        texts[f"examples/{path.stem}.md"], found = notebook_page(path)
        pictures |= {f"examples/{name}": data for name, data in found.items()}
    return texts, pictures


def notebook_page(path: Path) -> tuple[str, dict[str, bytes]]:
    """Markdown of a notebook, and its pictures by name.

    Raises:
        PluginError: an output of a kind that a page cannot show.
    """
    parts: list[str] = []
    pictures: dict[str, bytes] = {}
    for number, cell in enumerate(json.loads(path.read_text(encoding="utf-8"))["cells"]):
        source = "".join(cell["source"])
        if cell["cell_type"] != "code":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        shown: list[str] = []
        for place, output in enumerate(cell["outputs"]):
            data = output.get("data", {})
            if "image/png" in data:
                name = f"{path.stem}-{number}-{place}.png"
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts += [*_as_output(shown), f"![Output of the cell above]({name})"]
                shown = []
            elif text := "".join(output.get("text", data.get("text/plain", []))).strip("\n"):
                shown.append(text)
            else:
                raise PluginError(f"{path.name}, cell {number}: no page can show an output of {sorted(data)}")
        parts += _as_output(shown)
    parts.append(f"The notebook is `{path.relative_to(ROOT).as_posix()}` in the repository.")
    return "\n\n".join(parts) + "\n", pictures


def _as_output(texts: list[str]) -> list[str]:
    text = "\n".join(texts)
    return [f'<div class="output" markdown>\n\n```text\n{text}\n```\n\n</div>'] if texts else []
