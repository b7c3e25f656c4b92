"""Settings of a run's passes, which change its numbers by rounding at most."""

from typing import Self

from pydantic import Field, model_validator

from coar.errors import SettingsError
from coar.settings import Settings


class Execution(Settings):
    """Batches, memory and units of work.

    Attributes:
        batch_size: Most examples per forward pass; by default at most 128 on a CPU, 512 on CUDA, 256 elsewhere, and the
            fastest measured plan, which may put several masks into a forward pass.
        memory_limit: Most memory for activations, as bytes or text such as `4GiB`, measured on some examples; by
            default 80 % of the free memory of a CUDA device, and no limit elsewhere. Give this or a batch size.
        compile: Compile the model if that is faster on the first unit; if it fails, a warning gives the reason.
        precision_tolerance: Largest accepted root mean square difference of bfloat16, in units of the outputs'
            standard deviation over masks.
        mask_block: Masks per unit of work, fixed when the run is created; by default 64, and more in a run that would
            have more than 131,072 units.
        example_block: Examples per unit of work, fixed when the run is created; by default at most 512, or more as
            above. An output that compares with the unablated model keeps a part of its results for all of them: there
            are fewer if that part would exceed the memory limit, or 1 GiB without one.
        round_gradients: Store mean mask gradients with the precision of bfloat16, in about half the bytes; fixed when
            the run's first mask gradients are planned.

    Raises:
        SettingsError: When a number is out of range, or a batch size and a memory limit are given.
    """

    batch_size: int | None = Field(default=None, ge=1, strict=True)
    memory_limit: int | str | None = None
    compile: bool = False
    precision_tolerance: float = Field(default=0.05, gt=0)
    mask_block: int | None = Field(default=None, ge=1, strict=True)
    example_block: int | None = Field(default=None, ge=1, strict=True)
    round_gradients: bool = False

    @model_validator(mode="after")
    def _one_bound(self) -> Self:
        if self.batch_size is not None and self.memory_limit is not None:
            raise SettingsError(
                f"batch size {self.batch_size} and memory limit {self.memory_limit} both bound a batch; give one"
            )
        return self


DEFAULTS = Execution()
