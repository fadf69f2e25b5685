"""What the recipe card says of hardware, time and cost, and what of that does not agree."""

from collections.abc import Iterator
from dataclasses import dataclass

from igla_mega.config.schema import Recipe

WEEK, DAY, HOUR = 7 * 86400.0, 86400.0, 3600.0


@dataclass(frozen=True)
class Claim:
    """The card's words about one recipe."""

    number: int
    gpus: int
    gpu: str
    """A name of the hardware table."""
    seconds: tuple[float, float]
    dollars: float
    time: str
    """As the card writes it."""
    phases: int = 1
    """How many times the seconds and dollars are said for: those of a phase."""

    @property
    def implied_price(self) -> tuple[float, float]:
        """Dollars an hour of one GPU that cost and time amount to, of the longest and of the shortest time."""
        short, long = (seconds / HOUR * self.gpus for seconds in self.seconds)
        return self.dollars / long, self.dollars / short


CLAIMS: dict[str, Claim] = {
    "pretrain_7b": Claim(1, 64, "a100-80gb", (4 * WEEK, 6 * WEEK), 50_000, "4-6 weeks"),
    "koshey_7b": Claim(2, 128, "a100-80gb", (6 * WEEK, 8 * WEEK), 100_000, "6-8 weeks"),
    "lora_7b": Claim(3, 1, "a100-80gb", (2 * HOUR, 4 * HOUR), 10, "2-4 hours"),
    "qlora_7b": Claim(4, 1, "rtx-4090", (4 * HOUR, 8 * HOUR), 5, "4-8 hours"),
    "dpo_7b": Claim(5, 4, "a100-80gb", (4 * HOUR, 8 * HOUR), 100, "4-8 hours"),
    "sft_dpo_7b": Claim(6, 4, "a100-80gb", (12 * HOUR, 12 * HOUR), 150, "12 hours"),
    "moe_8x7b": Claim(7, 256, "a100-80gb", (8 * WEEK, 12 * WEEK), 500_000, "8-12 weeks"),
    "continual_7b": Claim(8, 64, "a100-80gb", (2 * WEEK, 3 * WEEK), 30_000, "2-3 weeks a phase", phases=3),
}


def claim_of(recipe_name: str) -> Claim | None:
    """The card's claim about a packaged recipe; None for a recipe of the user's own."""
    return CLAIMS.get(recipe_name)


def implied_utilization(claim: Claim, total_flops: float, peak_flops: float) -> tuple[float, float]:
    """The model FLOP utilisation of doing `total_flops` in the card's longest and in its shortest time."""
    short, long = (seconds * claim.phases * claim.gpus * peak_flops for seconds in claim.seconds)
    return total_flops / long, total_flops / short


def contradictions(recipe: Recipe, claim: Claim, *, tokens: int | None, steps: int, total_flops: float, peak: float):
    """Yield what the card says that does not agree with itself, or with arithmetic, a sentence each.

    Args:
        tokens: of all steps; None where the recipe counts epochs of data that nobody has named.
    """
    yield from _of_size(recipe)
    yield from _of_tokens(recipe, tokens, steps)
    low, high = implied_utilization(claim, total_flops, peak)
    if tokens is not None and high > 1:
        yield f"{claim.time} on {claim.gpus} GPUs is less than the work takes at their peak."
    elif tokens is not None and high < 0.2:
        yield (
            f"{claim.time} for {tokens / 1e9:,.4g}B tokens is {low:.1%} to {high:.1%} of the GPUs' peak, where 40 to "
            "60 % is usual: the time is several times what the work needs."
        )
    cheap, dear = claim.implied_price
    if dear < 1.0 and claim.gpu.startswith("a100"):
        yield f"${claim.dollars:,.0f} is ${cheap:.2f} to ${dear:.2f} for an hour of an A100, below what clouds ask."
    elif cheap > 2.5 and claim.gpu.startswith("a100"):
        yield f"${claim.dollars:,.0f} is ${cheap:.2f} to ${dear:.2f} for an hour of an A100, above what clouds ask."


def _of_size(recipe: Recipe) -> Iterator[str]:
    model = recipe.model
    if model is None:
        return
    billions = model.num_parameters(recipe.moe) / 1e9
    if recipe.moe is not None:
        active = model.matmul_parameters(recipe.moe) / 1e9
        yield f'"8x7B" of {billions:.1f}B parameters, not 56B: attention is shared; {active:.2f}B multiply each token.'
    elif abs(billions - 7) > 0.5:
        yield (
            f'"7B" of {billions:.2f}B parameters: {model.num_kv_heads} key-value heads of {model.num_heads} and width '
            f"{model.intermediate_size} make it smaller."
        )


def _of_tokens(recipe: Recipe, tokens: int | None, steps: int) -> Iterator[str]:
    said = recipe.data.total_tokens
    if tokens is not None and said is not None and abs(tokens - said) > 0.02 * said:
        yield (
            f"{steps:,} steps of {recipe.training.batch_size} are {tokens / 1e9:,.1f}B tokens, and data.total_tokens "
            f"says {said / 1e9:,.4g}B: {tokens / said:.1f} passes over it. The steps are what is run."
        )
    if recipe.koshey is not None and recipe.model is not None and recipe.training.batch_tokens is not None:
        rows = recipe.training.batch_tokens // (recipe.sequence_length or 1)
        if rows < 32:
            yield (
                f"a batch of {recipe.training.batch_size} is {rows} rows of {recipe.sequence_length:,} tokens: on more "
                "GPUs than that each row must be split over several."
            )
