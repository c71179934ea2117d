"""Each program in `examples/` runs offline on the bundled model and prints the right answers.

Most of them read a book that is shorter than that of the checkout.
"""

from __future__ import annotations

import os
import re
import runpy
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from star_attention import StarLLM
from star_attention.errors import InvalidInputError
from tests.desks import BOOK_TOKENS, lay_out
from tests.engines import BUNDLED
from tests.warm import python

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"

Run = Callable[..., str]


@pytest.fixture(scope="module")
def desk(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return lay_out(tmp_path_factory.mktemp("desk"))


@pytest.fixture
def run(desk: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run an example in this process, as `python examples/NAME ARGUMENTS` in that folder would."""
    monkeypatch.chdir(desk)

    def run_example(name: str, *arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", [name, *arguments])
        capsys.readouterr()
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return run_example


def test_every_example_is_tested() -> None:
    tested = set(re.findall(r'"(\w+\.py)"', Path(__file__).read_text(encoding="utf-8")))
    assert {path.name for path in EXAMPLES.glob("*.py")} == tested


def test_both_phases_in_one_file_equal_the_mask(run: Run) -> None:
    printed = run("star_attention_in_one_file.py")
    differences = re.findall(r"phase \d, largest difference from the mask: (\S+)", printed)
    assert len(differences) == 2
    assert all(0 < float(difference) < 1e-5 for difference in differences)


def test_ask_a_book(run: Run) -> None:
    printed = run("ask_a_book.py", str(EXAMPLES / "book.txt"))
    assert "tokens in 5 blocks" in printed
    assert "The secret number for quiet-harbor is 8811503\n" in printed


def test_ask_another_book(run: Run, tmp_path: Path) -> None:
    book = tmp_path / "notes.txt"
    book.write_text("The tea is hot.\n" * 9 + "The secret number for grey-goose is 4471903.\n")
    printed = run("ask_a_book.py", str(book), "What is the secret number for grey-goose?")
    assert "The secret number for grey-goose is 4471903\n" in printed


def test_many_questions(run: Run) -> None:
    printed = run("many_questions.py")
    answers = [line.split()[-1] for line in printed.splitlines() if line.startswith("What")]
    assert answers == ["1991709", "b34a-fe4c", "1486206", "2893308"]


def test_many_questions_from_a_file(run: Run, tmp_path: Path) -> None:
    questions = tmp_path / "questions.txt"
    questions.write_text("What is the secret number for dusty-violin?\n")
    printed = run("many_questions.py", "--questions", str(questions))
    assert (
        "What is the secret number for dusty-violin?  The secret number for dusty-violin" in printed
    )
    assert " 2844290\n" in printed
    assert "1 answers in" in printed


def test_questions_in_an_asyncio_program(run: Run) -> None:
    lines = run("async_questions.py").splitlines()
    assert [line.split()[-1] for line in lines] == ["8811503", "1991709", "b34a-fe4c"]


def test_saved_contexts(run: Run, tmp_path: Path) -> None:
    saved = str(tmp_path / "book.star")
    first, second = (run("saved_contexts.py", "--saved", saved) for _ in range(2))
    assert f"encoded {BOOK_TOKENS:,} tokens and saved them to" in first
    assert f"loaded {BOOK_TOKENS:,} tokens from" in second
    assert first.splitlines()[1:] == second.splitlines()[1:]
    assert "velvet-raven is 0bd3-6911\n" in second
    assert "extended by 36 tokens\n" in second
    assert "paper-kite is 5301946\n" in second


def test_langchain_chat(run: Run) -> None:
    pytest.importorskip("langchain_core")
    printed = run("langchain_chat.py")
    # Once, in pieces, and twice in a batch.
    assert printed.count("The secret number for rusty-anchor is b34a-fe4c") == 4
    usage = dict(input_tokens=BOOK_TOKENS + 15, output_tokens=20, total_tokens=BOOK_TOKENS + 35)
    assert str(usage) in printed


def test_langchain_conversations(monkeypatch: pytest.MonkeyPatch) -> None:
    """Roles, stop strings and further settings arrive; nothing is encoded again."""
    messages = pytest.importorskip("langchain_core.messages")
    program = runpy.run_path(str(EXAMPLES / "langchain_chat.py"))
    star = StarLLM.from_pretrained(BUNDLED, block_size=256, dtype="float32")
    text = "The tea is hot.\n" * 60 + "The secret number for grey-goose is 4471903.\n"
    chat = program["DocumentChat"].about(star, text)
    monkeypatch.setattr(star, "encode", None)
    question = "What is the secret number for grey-goose?"
    conversation = [messages.HumanMessage("Hello."), messages.AIMessage("Hello to you.")]
    expected = star.generate(
        chat.context,
        [
            {"role": "user", "content": "Hello."},
            {"role": "assistant", "content": "Hello to you."},
            {"role": "user", "content": question},
        ],
    )
    assert chat.invoke([*conversation, messages.HumanMessage(question)]).content == expected.text
    assert "4471903" in expected.text
    answer = chat.invoke(question, stop=[" is"])
    assert answer.content == "The secret number for grey-goose"
    assert answer.response_metadata["finish_reason"] == "stop"
    assert chat.invoke(question, max_new_tokens=2).response_metadata["finish_reason"] == "length"


def test_langchain_prompts_with_a_system_message() -> None:
    """Forbids the refusal of the prompt that most chains begin with."""
    prompts = pytest.importorskip("langchain_core.prompts")
    program = runpy.run_path(str(EXAMPLES / "langchain_chat.py"))
    star = StarLLM.from_pretrained(BUNDLED, block_size=256, dtype="float32")
    text = "The tea is hot.\n" * 60 + "The secret number for grey-goose is 4471903.\n"
    chat = program["DocumentChat"].about(star, text, system="Be brief.\n")
    prompt = prompts.ChatPromptTemplate([("system", "Be brief.\n"), ("user", "{question}")])
    question = "What is the secret number for grey-goose?"
    expected = star.generate(chat.context, question)
    assert (prompt | chat).invoke({"question": question}).content == expected.text
    with pytest.raises(InvalidInputError, match="role 'system'; give it before the text that is"):
        chat.invoke([("system", "Another."), ("user", question)])


def test_llama_index(run: Run) -> None:
    """Skipped by `make test`: the package is large."""
    pytest.importorskip("llama_index.core")
    printed = run("llama_index_llm.py")
    assert printed.count("The secret number for rusty-anchor is b34a-fe4c\n") == 3


def test_several_gpus_on_one_process(run: Run) -> None:
    printed = run("several_gpus.py", str(EXAMPLES / "book.txt"))
    assert "rank 0 of 1 holds 24.0 MiB" in printed
    assert "The secret number for silver-otter is 7382745\n" in printed


@pytest.mark.dist
@pytest.mark.slow
def test_a_notebook_on_two_ranks() -> None:
    """The other ranks end with the notebook, and say nothing."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / "notebook_on_several_gpus.py")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "rank 1  b4 " in done.stdout
    assert done.stdout.count("The secret number for silver-otter is 7382745\n") == 2
    assert done.stdout.count("The secret number for quiet-harbor is 8811503\n") == 1
    assert "Error" not in done.stderr


@pytest.mark.dist
def test_several_gpus_on_two_ranks() -> None:
    torchrun = python("-m", "torch.distributed.run", "--standalone", "--no-python")
    done = subprocess.run(
        [*torchrun, "--nproc-per-node", "2", *python(EXAMPLES / "several_gpus.py")],
        cwd=ROOT,
        env=os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert "rank 1  b4 " in done.stdout
    assert "rank 0 of 2 holds 10.0 MiB" in done.stdout
    assert done.stdout.count("The secret number for silver-otter is 7382745\n") == 1
