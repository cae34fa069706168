"""`trimtab modules MODEL`: the linear layers that methods can change."""

from __future__ import annotations

from typing import Any

from trimtab.app.cli.options import AsJson, Model
from trimtab.app.cli.output import emit_json, show, table

EXAMPLES = ("trimtab modules ref", "trimtab modules ref-mini --json")


def run(model: Model, as_json: AsJson = False) -> None:
    """Show the linear layers of a model: names, roles, shapes, parameters.

    Names and roles are what `--set targets=...` takes.
    """
    import trimtab as tt

    loaded = tt.load(model)
    view = tt.ModelView.of(loaded)
    rows: list[dict[str, Any]] = [
        {
            "name": linear.name,
            "role": linear.role,
            "block": linear.block,
            "out_features": linear.out_features,
            "in_features": linear.in_features,
            "parameters": linear.out_features * linear.in_features
            + (0 if linear.bias is None else linear.out_features),
            "stored_as": type(linear.module).__name__,
        }
        for linear in view.linears
    ]
    if as_json:
        emit_json({"model": model, "family": view.family, "linears": rows})
        return
    cells = [
        (r["name"], r["role"], f"{r['out_features']} x {r['in_features']}", f"{r['parameters']:,}", r["stored_as"])
        for r in rows
    ]
    columns = ("linear", "role", "out x in", "parameters", "stored as")
    in_linears = sum(r["parameters"] for r in rows)
    packed = sum(linear.out_features * linear.in_features for linear in view.linears if linear.compressed is not None)
    total = packed + sum(parameter.numel() for parameter in loaded.parameters())
    show(
        table(f"{model} ({view.family}, {len(view.blocks)} blocks)", columns, cells, right=columns[2:4]),
        f"{len(rows)} linears hold {in_linears:,} of the model's {total:,} parameters.",
    )
