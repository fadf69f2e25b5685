"""Claims of the recipe card on hardware, time and cost, and their contradictions."""

from collections.abc import Iterator
from dataclasses import dataclass

from igla_mega.config.schema import Recipe

WEEK, HOUR = 7 * 86400.0, 3600.0


@dataclass(frozen=True)
class Claim:
    """Claims of the card for one recipe."""

    number: int
    gpus: int
    gpu: str
    """Name in the hardware table."""
    seconds: tuple[float, float]
    """Shortest and longest time, of one phase if there are several."""
    dollars: float
    time: str
    """Time as written on the card."""
    phases: int = 1
    """Number of phases; seconds and dollars are per phase."""

    @property
    def implied_price(self) -> tuple[float, float]:
        """Price per GPU-hour in dollars implied by cost and time: for the longest and for the shortest time."""
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
    """Return the claim of the card for a packaged recipe, or None for any other recipe."""
    return CLAIMS.get(recipe_name)


def implied_utilization(claim: Claim, total_flops: float, peak_flops: float) -> tuple[float, float]:
    """Return the model FLOP utilization of `total_flops` in the longest and in the shortest time of the card."""
    short, long = (seconds * claim.phases * claim.gpus * peak_flops for seconds in claim.seconds)
    return total_flops / long, total_flops / short


def contradictions(recipe: Recipe, claim: Claim, *, tokens: int | None, steps: int, total_flops: float, peak: float):
    """Yield a sentence for each claim of the card that contradicts another one or arithmetic.

    Args:
        tokens: number of tokens of all steps; None if the recipe counts epochs of data of unknown size.
        total_flops: model FLOP of the whole run.
        peak: peak rate of one GPU, in FLOP/s.
    """
    yield from _of_size(recipe)
    yield from _of_tokens(recipe, tokens, steps)
    low, high = implied_utilization(claim, total_flops, peak)
    if tokens is not None and high > 1:
        yield f"{claim.time} on {claim.gpus} GPUs is less than the work takes at peak rate."
    elif tokens is not None and high < 0.2:
        yield (
            f"{claim.time} for {tokens / 1e9:,.4g}B tokens is {low:.1%} to {high:.1%} of the peak of the GPUs, where 40 to "
            "60 % is usual: the time is several times what the work needs."
        )
    # Cloud list prices of an A100 are about $1 to $2.50 per hour (May 2026; see `layout.hardware`).
    cheap, dear = claim.implied_price
    if dear < 1.0 and claim.gpu.startswith("a100"):
        yield f"${claim.dollars:,.0f} is ${cheap:.2f} to ${dear:.2f} per A100-hour, below cloud prices."
    elif cheap > 2.5 and claim.gpu.startswith("a100"):
        yield f"${claim.dollars:,.0f} is ${cheap:.2f} to ${dear:.2f} per A100-hour, above cloud prices."


def _of_size(recipe: Recipe) -> Iterator[str]:
    """Yield a sentence if the number of parameters differs from the name of the model."""
    model = recipe.model
    if model is None:
        return
    billions = model.num_parameters(recipe.moe) / 1e9
    if recipe.moe is not None:
        active = model.matmul_parameters(recipe.moe) / 1e9
        yield f'"8x7B" has {billions:.1f}B parameters, not 56B: attention is shared. {active:.2f}B are used per token.'
    elif abs(billions - 7) > 0.5:
        yield (
            f'"7B" has {billions:.2f}B parameters: {model.num_kv_heads} key-value heads for {model.num_heads} query heads '
            f"and width {model.intermediate_size} make it smaller."
        )


def _of_tokens(recipe: Recipe, tokens: int | None, steps: int) -> Iterator[str]:
    """Yield a sentence if steps and tokens disagree, or a batch has too few rows for its GPUs."""
    stated = recipe.data.total_tokens
    if tokens is not None and stated is not None and abs(tokens - stated) > 0.02 * stated:
        yield (
            f"{steps:,} steps of {recipe.training.batch_size} are {tokens / 1e9:,.1f}B tokens, but data.total_tokens "
            f"is {stated / 1e9:,.4g}B: {tokens / stated:.1f} passes over it. The number of steps applies."
        )
    if recipe.koshey is not None and recipe.model is not None and recipe.training.batch_tokens is not None:
        rows = recipe.training.batch_tokens // (recipe.sequence_length or 1)
        if rows < 32:
            yield (
                f"a batch of {recipe.training.batch_size} is {rows} rows of {recipe.sequence_length:,} tokens: with more "
                "GPUs, each row must be split over several of them."
            )
