"""Recipes from files: parents, scale and `--set` merged over each other, then validated."""

import difflib
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from igla_mega.config import breaches, rules, scales, yaml_text
from igla_mega.config.errors import ConfigError
from igla_mega.config.files import read_text
from igla_mega.config.merging import merge, without_nulls
from igla_mega.config.names import safe_name
from igla_mega.config.schema import Model, Recipe
from igla_mega.config.tiers import preset

RECIPES = Path(__file__).parent.parent / "recipes"
_MOST_LEVELS = 16
"""Maximum number of dots plus one in a key of `--set`."""
_MOST_PARENTS = 32
"""Maximum length of a chain of `extends`; a longer one is certainly a mistake."""


def packaged() -> dict[str, str]:
    """Return the packaged recipes, name -> first comment line of the file, in the order of their numbers."""
    order = ["pretrain_7b", "koshey_7b", "lora_7b", "qlora_7b", "dpo_7b", "sft_dpo_7b", "moe_8x7b", "continual_7b"]
    paths = {path.stem: path for path in RECIPES.glob("*.yaml")}
    names = sorted(paths, key=lambda name: (order.index(name) if name in order else len(order), name))
    return {name: _first_comment(paths[name]) for name in names}


def load_recipe(
    name_or_path: str | Path,
    *,
    scale: str | None = None,
    overrides: list[str] | None = None,
    say: scales.Say = lambda line: None,
) -> Recipe:
    """Return a recipe that satisfies all rules that do not depend on the world size.

    Later ones take precedence: presets of the koshey tier, packaged recipes, the scale, the user's recipes from parent
    to child, the overrides. A key drops others of the same meaning from those before it, such as `epochs`.

    Args:
        name_or_path: name of a packaged recipe, or a path.
        scale: name of an overlay in `recipes/scales`, such as `laptop`.
        overrides: `a.b=c` each, with c in YAML; `a.0.b=c` sets a key in a list element.
        say: called with a line for each key that is dropped, and for what the scale changes.

    Raises:
        ConfigError: the recipe is invalid; the message lists every breach.
    """
    path = _find(str(name_or_path))
    content: dict[str, Any] = {}
    packaged, own = content, content
    for file, layer in _with_parents(path, seen=[]):
        content = merge(content, layer)
        if file.resolve().parent == RECIPES.resolve():
            packaged = content
        else:
            own = scales.without_ruled_out(merge(own, layer), scales.keys_of(layer), file.name, lambda line: None)
            content = scales.without_ruled_out(content, scales.keys_of(layer), file.name, say)
    content.setdefault("name", safe_name(path.stem))
    if scale is not None:
        whole, content = content, scales.at_scale(content, packaged, own, scales.read_scale(scale))
        for line in scales.scale_lines(scale, whole, content, own):
            say(line)
    for override in overrides or []:
        content = _override(content, override)
    given = {override.partition("=")[0].strip() for override in overrides or []}
    content = scales.without_ruled_out(content, given, "--set", say)
    return _validate(_with_tiers(content))


def dump(recipe: Recipe) -> str:
    """Return the resolved recipe as YAML, from which `load_recipe` gives the same recipe."""
    plain = recipe.model_dump(mode="json", exclude_none=True)
    return yaml.safe_dump(plain, sort_keys=False, allow_unicode=True, width=120)


def base_folder(name: str, models: Path | None) -> Path:
    """Return the folder of a base model, given as `name` in the folder of models or as a path itself.

    Args:
        name: a Hugging Face folder; a checkpoint; or a run folder, its `checkpoints` or its `checkpoints/latest`, for
            the newest checkpoint.

    Raises:
        ConfigError: it does not exist, or contains neither a checkpoint nor a Hugging Face model.
    """
    candidates = [models / name, Path(name)] if models else [Path(name)]
    # `latest` is a file with the name of the newest checkpoint, not a link: its folder says the same.
    candidates = [path.parent if path.name == "latest" and path.is_file() else path for path in candidates]
    folder = next((path for path in candidates if path.is_dir()), None)
    if folder is None:
        where = f"in {models}" if models else "here, and neither --models nor $IGLA_MODELS is set"
        raise ConfigError(f"base_model: {name} not found {where}. Give --models, or a path.")
    if any((folder / file).is_file() for file in ("manifest.json", "config.json")):
        return folder
    for root in (folder / "checkpoints", folder):
        # Zero-padded, so the last name is the newest; without a manifest a checkpoint is not complete.
        if complete := sorted(manifest.parent for manifest in root.glob("step_????????/manifest.json")):
            return complete[-1]
    raise ConfigError(
        f"base_model: {folder} contains neither a model (config.json) nor a checkpoint (manifest.json), and is not a "
        "run folder with a complete checkpoint. Give one of these."
    )


def _first_comment(path: Path) -> str:
    """Return the first comment line of a recipe file, except the one for the language server."""
    lines = [line[1:].strip() for line in read_text(path).splitlines() if line.startswith("# ")]
    return next((line for line in lines if not line.startswith("yaml-language-server")), "")


def _find(name_or_path: str) -> Path:
    """Return the file of a packaged recipe or of a path.

    Raises:
        ConfigError: no such recipe or file.
    """
    is_path = name_or_path.endswith((".yaml", ".yml")) or os.sep in name_or_path or "/" in name_or_path
    is_path = is_path or (Path(name_or_path).exists() and not (RECIPES / f"{name_or_path}.yaml").is_file())
    path = Path(name_or_path) if is_path else RECIPES / f"{name_or_path}.yaml"
    if path.is_file():
        return path
    if path.is_dir():
        has = path / "recipe.yaml"
        own = f"Give its recipe: {has}." if has.is_file() else "Give the recipe's file."
        raise ConfigError(f"{name_or_path}: a folder, not a recipe. {own}")
    if is_path:
        raise ConfigError(f"{name_or_path}: no such file. Packaged recipes: {', '.join(packaged())}.")
    near = difflib.get_close_matches(name_or_path, packaged(), n=1)
    hint = f"did you mean `{near[0]}`?" if near else f"packaged recipes are {', '.join(packaged())}."
    raise ConfigError(f"{name_or_path}: no such recipe; {hint} Give your own recipe by its path, such as `my.yaml`.")


def _with_parents(path: Path, seen: list[Path]) -> list[tuple[Path, dict[str, Any]]]:
    """Return the files of a recipe and of those it extends, parents first, with their content.

    Args:
        seen: recipes that extend it.

    Raises:
        ConfigError: a file is missing or invalid, or the chain of `extends` is cyclic or too long.
    """
    if path.resolve() in seen:
        circle = " -> ".join(recipe.name for recipe in [*seen, path])
        raise ConfigError(f"{path}: extends itself: {circle}. Remove one `extends:`.")
    if len(seen) >= _MOST_PARENTS:
        raise ConfigError(f"{seen[0]}: extends a chain of more than {_MOST_PARENTS} recipes. Shorten it.")
    content = yaml_text.read_mapping(path)
    if seen:
        content.pop("name", None)
    parent = content.pop("extends", None)
    if parent is None:
        return [(path, content)]
    if not isinstance(parent, str):
        raise ConfigError(f"{path}: extends: {parent!r} is not the name or path of one recipe.")
    sibling = path.parent / parent
    try:
        parent_path = sibling if sibling.is_file() else _find(parent)
    except ConfigError as error:
        raise ConfigError(f"{path}: extends: {error}") from None
    return [*_with_parents(parent_path, [*seen, path.resolve()]), (path, content)]


def _with_tiers(content: dict[str, Any]) -> dict[str, Any]:
    """Merge the content over the presets of its `koshey.tier`; likewise in each stage."""
    koshey = content.get("koshey")
    tier = koshey.get("tier") if isinstance(koshey, dict) else None
    if isinstance(tier, int):
        content = merge(preset(tier), content)
    return _in_stages(content, _with_tiers)


def _in_stages(content: dict[str, Any], change: Callable[[dict[str, Any]], dict[str, Any]]) -> dict[str, Any]:
    """Return a copy with `change` applied to each of `stages:`."""
    stages = content.get("stages")
    if not isinstance(stages, list):
        return content
    return {**content, "stages": [change(stage) if isinstance(stage, dict) else stage for stage in stages]}


def _override(content: dict[str, Any], override: str) -> dict[str, Any]:
    """Return a copy with one `--set KEY=VALUE` applied."""
    path, equals, written = override.partition("=")
    parts = path.strip().split(".")
    if not equals or not all(parts):
        raise ConfigError(f"--set {override}: write KEY=VALUE, such as `training.total_steps=100`.")
    if len(parts) > _MOST_LEVELS:
        raise ConfigError(f"--set: the key has {len(parts)} levels, and no key has more than {_MOST_LEVELS}.")
    return _put(content, parts, yaml_text.parse(written, f"--set {override}"), override)


def _put(container: Any, parts: list[str], value: Any, override: str) -> Any:
    """Return a copy of `container` with `value` at the keys `parts`.

    Raises:
        ConfigError: an index is out of range, or a key is within a plain value.
    """
    if not parts:
        return value
    head, *rest = parts
    if isinstance(container, list):
        # isdigit is also True for `²`, which int() refuses.
        if not (head.isascii() and head.isdigit()) or len(head) > 9 or int(head) >= len(container):
            raise ConfigError(f"--set {override}: `{head}` is not an index from 0 to {len(container) - 1}.")
        return [_put(item, rest, value, override) if i == int(head) else item for i, item in enumerate(container)]
    if container is not None and not isinstance(container, dict):
        raise ConfigError(f"--set {override}: `{head}` is within {container!r}, which is a value, not a section.")
    return {**(container or {}), head: _put((container or {}).get(head), rest, value, override)}


def _validate(content: dict[str, Any]) -> Recipe:
    """Return the recipe of the merged content.

    Raises:
        ConfigError: the schema or a rule refuses it; the message lists every breach.
    """
    content = without_nulls(content)
    for part in (content, *(content["stages"] if isinstance(content.get("stages"), list) else ())):
        _refuse_part_of_a_shape(part)
    try:
        recipe = Recipe.model_validate(content)
    except ValidationError as error:
        raise ConfigError(*breaches.of_schema(error), *_rules_on_the_rest(error, content)) from None
    rules.check(recipe)
    return recipe


def _refuse_part_of_a_shape(content: Any) -> None:
    """Raise ConfigError for some keys of `model:` next to a base model, which has a shape of its own."""
    given, base = (content.get(key) if isinstance(content, dict) else None for key in ("model", "base_model"))
    needed = {key for key, field in Model.model_fields.items() if field.is_required()}
    if (
        base
        and isinstance(given, dict)
        and given
        and given.keys() <= Model.model_fields.keys()
        and needed - given.keys()
    ):
        raise ConfigError(
            f"model.{next(iter(given))}: given next to base_model {base}, which has a shape of its own.\n"
            "  Remove it from `model:`, or remove base_model and give the whole shape."
        )


def _rules_on_the_rest(error: ValidationError, content: dict[str, Any]) -> list[str]:
    """Return the breaches of the rules by the valid keys, so that one run reports both kinds of error."""
    broken: list[breaches.Place] = []
    rest: Recipe | None = None
    # A removed key may be a required one; then its section is invalid and is removed in the next round.
    while rest is None:
        places = [detail["loc"] for detail in error.errors()]
        content = breaches.without(content, places)
        broken += places
        try:
            rest = Recipe.model_validate(content)
        except ValidationError as next_error:
            if next_error.errors() == error.errors():
                return []
            error = next_error
    keys = {breaches.dotted(place) for place in broken}
    # A rule that mentions a removed key or its section may be breached only because the key is missing.
    above = tuple(f"{breaches.dotted(place[:depth])}:" for place in broken for depth in range(1, len(place)))
    found = rules.breaches(rest)
    return [breach for breach in found if not breach.startswith(above) and not any(key in breach for key in keys)]
