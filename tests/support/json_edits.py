"""Random damage to a JSON value, as hypothesis draws it."""

import json

from hypothesis import HealthCheck
from hypothesis import strategies as st

JSON_VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.integers(0, 300)
    | st.floats()
    | st.text(max_size=8)
    | st.sampled_from(["BF16", "F8_E4M3", "fp8", "yarn", "../x", "model.norm.weight", "sigmoid"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=4,
)


# An edit goes down into the value by the numbers, then replaces, removes, renames or repeats what it finds.
EDITS = st.lists(
    st.tuples(
        st.lists(st.integers(0, 10**6), min_size=1, max_size=4),
        st.sampled_from(["replace", "remove", "rename", "move"]),
        JSON_VALUES,
    ),
    min_size=1,
    max_size=4,
)


FUZZ = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture, HealthCheck.too_slow]}


def edited(value, edits):
    """A copy of `value` with edits drawn from `EDITS`."""
    value = json.loads(json.dumps(value))
    for path, action, new in edits:
        parent, key, node = None, None, value
        for step in path:
            if not isinstance(node, dict | list) or not node:
                break
            parent, keys = node, list(node) if isinstance(node, dict) else range(len(node))
            key = keys[step % len(keys)]
            node = node[key]
        if parent is None:
            value = new
        elif action == "remove":
            del parent[key]
        elif action == "rename" and isinstance(parent, dict):
            parent[str(new)] = parent.pop(key)
        elif action == "move" and isinstance(parent, dict):
            parent[key] = parent[list(parent)[0]]
        else:
            parent[key] = new
    return value
