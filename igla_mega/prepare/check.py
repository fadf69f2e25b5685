"""Check prepared data against its manifest and the model before ranks start."""

import re

from igla_mega.config.errors import ConfigError
from igla_mega.config.schema import Recipe
from igla_mega.data.blend import consumption, normalised
from igla_mega.data.indexed import IndexedReader, part_prefixes
from igla_mega.data.prepared import TARGETS, sample_prefixes, source_prefixes
from igla_mega.data.tokenizer import digest_at
from igla_mega.data.windows import split_point
from igla_mega.layout.layout import Layout
from igla_mega.layout.stages import drawn_data
from igla_mega.prepare.manifest import damage


def check_prepared(recipe: Recipe, layout: Layout) -> None:
    """Check the prepared data of a recipe, and print how much of it will be read.

    Raises:
        ConfigError: a dataset is missing or damaged, was made with another tokenizer, or holds ids outside of the
            model's vocabulary.
    """
    assert recipe.model is not None, "the caller knows the model"
    breaches: list[str] = []
    alike: dict[str, list[str]] = {}
    tokens = {}
    if recipe.form != "text":
        for prefix in sample_prefixes(recipe).values():
            for part in (prefix, prefix + TARGETS) if recipe.form == "instructions" else (prefix,):
                try:
                    IndexedReader(part, recipe.model.vocab_size)
                except ConfigError as error:
                    breaches += error.breaches
        if breaches:
            raise ConfigError(*breaches)
        return
    digest = digest_at(recipe.data.tokenizer)
    for name, prefix in source_prefixes(drawn_data(recipe)).items():
        try:
            reader = IndexedReader(prefix, recipe.model.vocab_size)
            tokens[name] = split_point(name, reader, recipe.data.validation_fraction)
            for part in part_prefixes(prefix):
                breaches += damage(part, tokenizer_digest=digest)
        except ConfigError as error:
            # Sources prepared with another tokenizer than the model's are all wrong in the same way.
            kind = re.sub(r"[\d,]+", "#", str(error).replace(prefix, ""))
            alike.setdefault(kind, []).append(name)
            breaches += error.breaches if len(alike[kind]) == 1 else []
    breaches += [f"  Likewise in {', '.join(names[1:])}." for names in alike.values() if len(names) > 1]
    if breaches:
        raise ConfigError(*breaches)
    if note := normalised(recipe.data.mix):
        print(note)
    steps = recipe.training.total_steps
    if steps and recipe.data.mix and recipe.curriculum is None:
        for line in consumption(recipe.data.mix, tokens, steps * layout.global_batch * layout.sequence_length):
            print(line)
