"""results/gallery.gif, the moving picture at the top of the READMEs.

    python experiments/gallery.py RUN RUN RUN    from denoising.gif of these run folders

Films that are about as high as wide stand side by side, and wide ones below. Each is
made as long as the others: its frames are repeated or left out.
"""

import sys
from pathlib import Path

from PIL import Image, ImageSequence

ROOT = Path(__file__).resolve().parent.parent


def read(folder, frames):
    """denoising.gif of a run folder, as a list of `frames` pictures."""
    film = Image.open(Path(folder) / "denoising.gif")
    film = [picture.convert("RGB") for picture in ImageSequence.Iterator(film)]
    return [film[i * (len(film) - 1) // (frames - 1)] for i in range(frames)]


def main(*folders, file=ROOT / "results/gallery.gif", height=270, frames=24, gap=10):
    """Write the file from the denoising.gif of each run folder."""
    films = [read(folder, frames) for folder in folders]
    wide = [film for film in films if film[0].width > 2 * film[0].height]
    square = [film for film in films if film not in wide]
    widths = [round(film[0].width * height / film[0].height) for film in square]
    total = sum(widths) + gap * (len(square) - 1)
    heights = [round(film[0].height * total / film[0].width) for film in wide]
    sheets = []
    for i in range(frames):
        size = total, height + sum(heights) + gap * len(wide)
        sheet, left, top = Image.new("RGB", size, "white"), 0, height + gap
        for film, width in zip(square, widths, strict=True):
            sheet.paste(film[i].resize((width, height), Image.NEAREST), (left, 0))
            left += width + gap
        for film, high in zip(wide, heights, strict=True):
            sheet.paste(film[i].resize((total, high), Image.BOX), (0, top))
            top += high + gap
        sheets.append(sheet.quantize(16))
    times = [100] * (frames - 1) + [1500]
    first, *rest = sheets
    first.save(file, save_all=True, append_images=rest, duration=times, loop=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
