"""What users of servers report again and again, and the tests that forbid it here."""

from __future__ import annotations

import ast
import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from tests.servers import DOCUMENT, Server, in_parts, running, saying
from tests.talkers import byte_level, talker

TESTS = Path(__file__).parents[1]
CHAT = "/v1/chat/completions"
HELLO: list[dict[str, Any]] = [{"role": "user", "content": "the cat"}]

REPORTS = {
    "a client leaves, and its answer or document goes on": (
        "leaving::test_a_client_that_leaves_while_its_answer_is_generated",
        "leaving::test_a_client_that_leaves_before_its_context_is_there",
        "leaving::test_a_client_that_leaves_in_the_middle_of_its_request",
    ),
    "one long prompt takes the memory, and the engine ends for all": (
        "faults::test_too_little_memory_for_good",
        "faults::test_too_little_memory_once",
        "budget::test_running_out_of_memory_evicts_and_tries_once_more",
    ),
    "a prompt that is too long gives 500, or an error inside of a 200": (
        "refusals::test_a_prompt_beyond_the_positions",
        "clients/test_clients.py::test_client",
    ),
    "a prompt is cut in silence": ("clients::test_nothing_of_a_long_prompt_is_cut_off",),
    "answers are cut by a small default": (
        "clients::test_answers_without_a_limit_say_whether_they_were_cut",
    ),
    "the usage is missing, null, or breaks clients": (
        "clients::test_a_stream_equals_the_whole",
        "clients::test_a_stream_has_no_usage_unless_asked_for",
        "contexts_api::test_twenty_questions_encode_once",
        "recorded::test_what_clients_have_sent",
    ),
    "characters come in halves, or twice": (
        "streams::test_characters_of_several_tokens",
        "reports::test_an_answer_that_ends_inside_of_a_character",
    ),
    "stop strings leak, or cut too much": (
        "clients::test_stops_end_an_answer_and_are_not_in_it",
        "reports::test_stops_of_answers_that_share_steps",
    ),
    "a long silence ends the connection, and the retry begins again": (
        "streams::test_signs_of_life_while_a_document_is_read",
        "contexts_api::test_a_client_that_leaves_and_comes_back",
        "clients/test_clients.py::test_langchain_waits_for_a_document",
    ),
    "a date near the top defeats the cache": (
        "prompts::test_an_answer_says_why_its_document_was_encoded",
        "contexts_api::test_marks_and_files_cut_alike",
    ),
    "an equal prefix is read again": (
        "contexts_api::test_twenty_questions_encode_once",
        "contexts_api::test_contexts_survive_a_restart",
    ),
    "a text that is cut has other tokens": (
        "cut::test_both_parts_have_the_tokens_of_the_whole",
        "cut::test_the_context_does_not_depend_on_the_question",
    ),
    "a saved cache is there and not used": (
        "contexts_api::test_contexts_survive_a_restart",
        "encoder::test_damage_costs_an_encode_and_no_answer",
        "killed::test_a_kept_context_is_there_after_a_kill_and_after_damage",
    ),
    "an answer from the cache is another one": (
        "encoder::test_hits_and_misses_answer_like_generate",
        "contexts_api::test_twenty_questions_encode_once",
        "conversations::test_each_turn_computes_what_is_new",
    ),
    "one long document stops all others": (
        "faults::test_a_long_text_holds_up_nobody",
        "encoder::test_rows_go_on_while_a_context_is_encoded",
    ),
    "health is 200 while the engine hangs, or fails while it is busy": (
        "leaving::test_health_while_the_engine_hangs",
        "reports::test_health_while_a_long_document_is_read",
    ),
    "long documents hit the limit of a body": ("refusals::test_a_body_beyond_the_limit",),
    "the developer role, or parts, are refused": (
        "refusals::test_the_developer_role_and_several_system_messages",
        "cut::test_instructions_that_a_template_takes_at_the_beginning_only",
    ),
    "the end of the server kills what runs, or waits for ever": (
        "leaving::test_answers_under_way_end_before_the_server_does",
        "leaving::test_answers_that_take_too_long_at_the_end_get_an_error",
        "leaving::test_a_signal_ends_the_program",
    ),
    "documents that take turns drop one another": (
        "budget::test_round_robin_over_too_many_documents_reads_them_from_disk",
    ),
    "an error in a stream is one that no client sees": (
        "leaving::test_an_error_after_the_first_byte_is_one_that_clients_raise",
        "responses::test_an_error_in_a_stream_is_raised_by_the_client",
    ),
    "equal digests, or equal texts, show one client's context to another": (
        "contexts::test_equal_keys_do_not_make_contexts_the_same",
        "contexts::test_tenants_and_salts_never_meet",
        "contexts_api::test_contexts_of_another_tenant",
    ),
    "requests that share a step share their sampling": (
        "clients::test_the_async_client_with_many_requests_at_once",
    ),
}
"""What goes wrong, and tests that see it: `NAME::test` is in `test_serve_NAME.py` beside this."""


@pytest.mark.parametrize("report", REPORTS)
def test_each_report_has_its_tests(report: str) -> None:
    for name in REPORTS[report]:
        file, _, test = name.partition("::")
        path = TESTS / (file if file.endswith(".py") else f"unit/test_serve_{file}.py")
        tree = ast.parse(path.read_text(encoding="utf-8"))
        assert test in {getattr(node, "name", "") for node in tree.body}, name


def streamed(server: Server, **fields: Any) -> str:
    """Return the text of a stream."""
    text = server.post(CHAT, {"messages": HELLO, "stream": True, **fields}).text
    chunks = [json.loads(line[6:]) for line in text.split("\n\n") if line.startswith("data: {")]
    return "".join(each["choices"][0]["delta"].get("content", "") for each in chunks)


def whole(server: Server, **fields: Any) -> str:
    answer = server.post(CHAT, {"messages": HELLO, **fields}).json()
    text: str = answer["choices"][0]["message"]["content"]
    return text


def test_an_answer_that_ends_inside_of_a_character() -> None:
    """Forbids that a stream and a whole answer differ where the limit cuts a character."""
    tokenizer = byte_level(chat="{{ messages[0].content }}")
    said = "a🦦e\N{COMBINING ACUTE ACCENT}日"
    ids = tokenizer(said).input_ids
    assert len(ids) > len(said)
    with running(talker(tokenizer), before=saying(said)) as server:
        for tokens in range(1, len(ids) + 1):
            text = whole(server, max_tokens=tokens)
            assert streamed(server, max_tokens=tokens) == text
            assert said.startswith(text.rstrip("\N{REPLACEMENT CHARACTER}"))
            assert text.count("\N{REPLACEMENT CHARACTER}") <= 1


STOPS = {
    # Over several tokens, at the beginning, and where one begins inside of another.
    "on the": "the cat sat ",
    "the": "",
    "cat sat on": "the ",
    "mat": "the cat sat on the ",
    "sat on a": "the cat sat on the mat",
}


def test_stops_of_answers_that_share_steps() -> None:
    """Forbids that an answer ends at another one's stop string, or shows a part of its own."""
    tokenizer = byte_level(chat="{{ messages[0].content }}")
    with (
        running(talker(tokenizer), before=saying("the cat sat on the mat")) as server,
        ThreadPoolExecutor(2 * len(STOPS)) as clients,
    ):
        stops = [[stop, f"{stop} or not"] for stop in STOPS]
        streams = [clients.submit(streamed, server, stop=stop) for stop in stops]
        wholes = [clients.submit(whole, server, stop=stop) for stop in stops]
        assert [each.result() for each in streams] == list(STOPS.values())
        assert [each.result() for each in wholes] == list(STOPS.values())


@pytest.mark.slow
def test_health_while_a_long_document_is_read() -> None:
    """Forbids 503 for a server that is only busy."""
    body = {"messages": in_parts(DOCUMENT * 60, "Who?", mark=True), "max_tokens": 1}
    with running(engine_stall=1) as server, ThreadPoolExecutor(1) as client:
        answer = client.submit(server.post, CHAT, body)
        seen = []
        while not answer.done():
            seen.append(server.get("/health").status_code)
        assert answer.result().status_code == 200
        assert server.metric("encodes_total", outcome="done") == 1
    assert set(seen) == {200}
    assert len(seen) > 10
