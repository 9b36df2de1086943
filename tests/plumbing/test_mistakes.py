"""Values that do not fit each other or the data: one line that names the flag, before anything is written."""

import conditional_diffusion_example as conditional
import ddim_example as ddim
import latent_diffusion_example as latent
from experiments import compare
from PIL import Image

import pytest
from conftest import experiment


def refused(main, argv, words, tmp_path, capsys):
    """main ends with status 2 and one line that has these words."""
    with pytest.raises(SystemExit) as stop:
        main([*argv, "--device", "cpu", "--out", str(tmp_path / "out")])
    said = capsys.readouterr().err.strip().splitlines()
    assert stop.value.code == 2 and said[-1].startswith("error: "), said
    assert all(word in said[-1] for word in words), said
    assert not (tmp_path / "out").exists()


SMOKE = ["--preset", "smoke"]


@pytest.mark.parametrize("main", [ddim.main, experiment("ddim").main], ids=["page", "experiment"])
@pytest.mark.parametrize("argv, words", [
    ("--S 1001", ["--S 1001", "at most T, 1000"]),
    ("--sigma_hat", ["--eta 0", "must be 1 with --sigma_hat"])])
def test_what_ddim_refuses(main, argv, words, tmp_path, capsys):
    refused(main, argv.split(), words, tmp_path, capsys)


@pytest.mark.parametrize("argv, words", [
    ("--schedule cosine --T 1000", ["--schedule cosine", "alpha_bar_T", "1e-06"]),
    ("--T 20", ["--schedule linear", "--T 20", "alpha_bar_T = 5.6e-11"]),
    ("--factor 8 --image_size 28", ["--image_size 28", "multiple of 16", "factor 8", "16, 32"]),
    ("--factor 2 --vae_patch 4", ["--vae_patch 4", "--factor 2"]),
    ("--vae_channels 6", ["--groups 4", "--vae_channels 6"]),
    ("--S 51", ["--S 51", "50"]),
    ("--vae nowhere.pt", ["nowhere.pt"])])
def test_what_latent_refuses(argv, words, tmp_path, capsys):
    refused(latent.main, SMOKE + argv.split(), words, tmp_path, capsys)


@pytest.mark.parametrize("argv, words", [
    ("--classes 3 10", ["--classes 10", "0, 1, 2, 3, 4, 5, 6, 7, 8, 9"]),
    ("--classes -1", ["--classes -1", "0, 1, 2"]),
    ("--w 0 -2", ["--w 0.0 -2.0", ">= -1"]),
    ("--w", ["--w", "at least one"]),
    ("--backbone dit --dit_kernel 2", ["--dit_kernel 2", "odd"]),
    ("--backbone dit --dit_patch 5", ["--image_size 28", "multiple of 5", "25, 30"]),
    ("--backbone dit --dit_heads 5", ["--dit_heads 5", "--dit_width 16"]),
    ("--backbone dit --dit_width 18", ["--dit_width 18", "multiple of 4"]),
    ("--p_uncond 1", ["--p_uncond 1", "below 1", "--guidance classifier_free"]),
    ("--p_uncond 1 --guidance none", ["--p_uncond 1", "below 1", "--guidance none"]),
    ("--p_uncond 0", ["--p_uncond 0", "null class"]),
    ("--S 21", ["--S 21", "at most T, 20"])])
def test_what_conditional_refuses(argv, words, tmp_path, capsys):
    refused(conditional.main, SMOKE + argv.split(), words, tmp_path, capsys)


@pytest.mark.parametrize("argv, words", [
    ("--dit_heads 5", ["--dit_heads 5", "--dit_width 16"]),  # before the U-Net is trained
    ("--backbone dit", ["--backbone", "both"]),
    ("--steps 7", ["--steps", "--seconds"]),
    ("--w 3", ["--w", "--w_samples"]),
    ("--sample", ["--sample", "trained anew"])])
def test_what_compare_refuses(argv, words, tmp_path, capsys):
    """It refuses what it would not use."""
    preset = [] if "--sample" in argv else SMOKE
    refused(compare.main, preset + argv.split(), words, tmp_path, capsys)


def test_data_without_labels_has_no_classes_to_draw(tmp_path, capsys):
    for i in range(12):
        Image.new("RGB", (32, 32), (20 * i, 9, 9)).save(tmp_path / f"{i}.png")
    refused(conditional.main, [*SMOKE, "--dataset", f"folder:{tmp_path}"], ["no labels"], tmp_path, capsys)
