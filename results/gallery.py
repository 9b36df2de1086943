"""results/gallery.gif, the moving picture at the top of the READMEs.

    python results/gallery.py RUN RUN RUN       of run folders: their denoising.gif

The GIFs stand side by side, each as long as the longest: frames are held or left out.
"""

import sys
from pathlib import Path

from PIL import Image, ImageSequence

ROOT = Path(__file__).resolve().parent.parent


def main(*folders, file=ROOT / "results/gallery.gif", height=300, frames=33):
    """Write the file from denoising.gif of each run folder."""
    films = []
    for folder in folders:
        film = Image.open(Path(folder) / "denoising.gif")
        film = [picture.convert("RGB") for picture in ImageSequence.Iterator(film)]
        width = round(film[0].width * height / film[0].height)
        film = [film[i * (len(film) - 1) // (frames - 1)] for i in range(frames)]
        films.append([picture.resize((width, height)) for picture in film])
    sheets = []
    for row in zip(*films, strict=True):
        sheet = Image.new("RGB", (sum(p.width + 12 for p in row) - 12, height), "white")
        left = 0
        for picture in row:
            sheet.paste(picture, (left, 0))
            left += picture.width + 12
        sheets.append(sheet.quantize(32))
    times = [80] * (frames - 1) + [1500]
    sheets[0].save(file, save_all=True, append_images=sheets[1:], duration=times, loop=0)


if __name__ == "__main__":
    main(*sys.argv[1:])
