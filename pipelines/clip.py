"""The published CLIP (Radford et al. 2021), and photographs with and without the written name of another class.

    pip install '.[text]'
    export COAR_CLIP=/path/to/clip-vit-base-patch32                    # optional: a folder, or a name on the hub
    export COAR_CLIP_PICTURES=/path/to/pictures
    coar collect pipelines/clip.py --gradients 96
    coar fit runs/clip-mean.zarr
    coar edit runs/clip-mean.zarr --pipeline pipelines/clip.py --task typographic

The folder of pictures has a sub-folder per class in `clean` and in `attacked`, and the two versions of one picture have
the same name: `clean/tabby cat/012.jpg` and `attacked/tabby cat/012.jpg`, the second with the name of another class
written on it. The classes are the names of the sub-folders. Every second pair is studied, the others are for judging.
Without COAR_CLIP, openai/clip-vit-base-patch32 is fetched from the hub of Hugging Face.
"""

from functools import cache
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

import coar
from pipelines import hub, photographs, studies, zero_shot

try:
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer
except ImportError as error:
    raise coar.errors.PipelineError(
        f"the pipeline clip needs {error.name}, which is not installed; {coar.errors.install_hint('text')}"
    ) from None

MASKS = 5_000
TEST_MASKS = 300
TEST_FRACTIONS = (0.05,)
GOAL = coar.EditGoal(targets="attacked == 1", references="attacked == 0", direction="increase", pairs="pair")

SOURCE = hub.Source(
    name="CLIP",
    variable="COAR_CLIP",
    default="openai/clip-vit-base-patch32",
    contents="openai/clip-vit-base-patch32 or another CLIP, its model, tokenizer and image processor",
)
PROMPT = "a photo of a {}"
VERSIONS = ("clean", "attacked")
WANTED = "pictures as clean/<class>/<name> and attacked/<class>/<name>"
ENDINGS = (".jpg", ".jpeg", ".png", ".webp")


def pictures() -> Path:
    """Return the folder of pictures."""
    return photographs.folder("COAR_CLIP_PICTURES", WANTED)


@cache
def pairs(root: Path) -> list[tuple[str, str]]:
    """Return (class, name) of all pictures, sorted; raise `PipelineError` when clean and attacked ones do not match."""
    found = [
        {(file.parent.name, file.name) for file in (root / version).glob("*/*") if file.suffix.lower() in ENDINGS}
        for version in VERSIONS
    ]
    alone = sorted(found[0] ^ found[1])
    if alone or not found[0]:
        what = f"{'/'.join(alone[0])} in one of clean and attacked only" if alone else "no pictures"
        raise coar.errors.PipelineError(f"{root} has {what}; put there {WANTED}, the same names in both")
    return sorted(found[0])


def classes(root: Path) -> list[str]:
    """Return the names of the classes, sorted."""
    return sorted({kind for kind, _ in pairs(root)})


def examples(rows: slice) -> coar.Examples:
    """Return pairs: all clean pictures, then the same with a written word."""
    root, processor = pictures(), SOURCE.load(CLIPImageProcessor)

    def prepare(picture: Image.Image) -> Tensor:
        return processor(picture, return_tensors="pt")["pixel_values"][0]

    chosen, numbers = pairs(root)[rows], np.arange(len(pairs(root)))[rows]
    kinds, attacked = [kind for kind, _ in chosen] * 2, np.repeat([0, 1], len(chosen))
    files = [root / version / kind / name for version in VERSIONS for kind, name in chosen]
    return coar.Examples(
        inputs=coar.ImageFiles(files, prepare),
        targets=torch.tensor([classes(root).index(kind) for kind in kinds]),
        metadata={
            "id": 2 * np.tile(numbers, 2) + attacked,
            "pair": np.tile(numbers, 2),
            "attacked": attacked,
            "group": kinds,
        },
    )


def model() -> zero_shot.ZeroShot:
    """Return the zero-shot classifier of the pictures' classes."""
    clip, tokenizer = SOURCE.model(CLIPModel), SOURCE.load(CLIPTokenizer)
    words = clip.config.text_config.vocab_size
    if len(tokenizer) != words:  # transformers makes a tokenizer of its own when a folder lacks the file
        raise SOURCE.unusable(f"the tokenizer has {len(tokenizer)} words where the model has {words}")
    prompts = [PROMPT.format(kind.replace("_", " ")) for kind in classes(pictures())]
    return zero_shot.ZeroShot(clip, dict(tokenizer(prompts, padding=True, return_tensors="pt")))


def study(*, ablation: str = "mean", ablated_fraction: float = 0.10, seed: int = 0) -> coar.Study:
    """Define the study of every second pair; `ablation` is `mean`, with means of clean pictures, or `zero`."""
    net, studied = model(), examples(slice(0, None, 2))
    return studies.of_margins(
        net,
        studied,
        components=zero_shot.components(net, ablation),
        calibration=studied.subset(np.asarray(studied.metadata["attacked"]) == 0),
        ablation=ablation,
        ablated_fraction=ablated_fraction,
        seed=seed,
    )


def judge() -> coar.Examples:
    """Return the other pairs, which no attribution and no choice has seen."""
    return examples(slice(1, None, 2))
