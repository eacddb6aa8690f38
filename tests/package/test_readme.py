"""Every fenced python block of README.md runs, in order, in one namespace.

The namespace holds what a reader is told to have: logits with labels, a file of pairs, a folder with a model.
"""

import re

import pytest
from doc_blocks import blocks
from places import ROOT

pytestmark = pytest.mark.slow

torch = pytest.importorskip("torch")
pytest.importorskip("transformers")
pytest.importorskip("trl")


def namespace():
    torch.manual_seed(0)
    labels = torch.randint(0, 50, (4, 12))
    labels[:, :4] = -100
    labels[1, 9:] = -100
    return {
        "__name__": "readme",
        "logits": torch.randn(4, 12, 50, requires_grad=True),
        "labels": labels,
        "ref_logps": torch.randn(2, 2) - 30,
    }


@pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::UserWarning")
@pytest.mark.usefixtures("reader_folder")
def test_every_python_block_runs():
    names = {}
    for code in blocks(ROOT / "README.md"):
        names |= namespace()  # what one block computes is not what the next one is told to have
        exec(compile(code, "README.md", "exec"), names)


def test_before_and_after_of_the_readme_give_the_same_loss_and_gradient():
    before, after = (code for code in blocks(ROOT / "README.md") if "labels" in code)
    names = namespace()
    exec(before, names)
    expected = names["loss"]
    (expected_grad,) = torch.autograd.grad(expected, names["logits"])
    names = namespace()
    exec(after, names)
    (grad,) = torch.autograd.grad(names["loss"], names["logits"])
    torch.testing.assert_close(names["loss"], expected, atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(grad, expected_grad, atol=1e-7, rtol=1e-5)


def test_readme_names_only_targets_and_files_that_exist():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in re.findall(r"`make ([a-z-]+)", text):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), f"make {target}"
    for link in re.findall(r"\]\((?!https?:|#)([^)#]+)", text):
        assert (ROOT / link).exists(), link
