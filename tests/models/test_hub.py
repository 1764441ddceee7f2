"""The Hub is asked once, and a Hub that does not answer is said at once."""

import ssl
from urllib.error import HTTPError, URLError

import pytest

from oa_train.models import hub


@pytest.fixture(autouse=True)
def online(monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", False)
    hub.hub_answers.cache_clear()
    yield
    hub.hub_answers.cache_clear()


def asked(monkeypatch, answer):
    questions = []

    def urlopen(request, timeout):
        questions.append(request.full_url)
        if isinstance(answer, Exception):
            raise answer
        return answer

    monkeypatch.setattr(hub, "urlopen", urlopen)
    return questions


class Answer:
    def close(self):
        pass


@pytest.mark.parametrize(
    "answer", [Answer(), HTTPError("u", 503, "busy", None, None), URLError(ssl.SSLError("unknown authority"))]
)
def test_any_answer_counts_and_is_asked_for_once(monkeypatch, answer):
    questions = asked(monkeypatch, answer)
    assert hub.hub_answers()
    assert hub.hub_answers()
    assert len(questions) == 1


@pytest.mark.parametrize("answer", [URLError(OSError("no route")), TimeoutError()])
def test_silence_is_warned_of_once(monkeypatch, answer):
    asked(monkeypatch, answer)
    with pytest.warns(UserWarning, match="does not answer within 5 s") as caught:
        assert not hub.hub_answers()
    assert not hub.hub_answers()
    assert len(caught) == 1


def test_offline_by_the_environment_nothing_is_asked(monkeypatch):
    monkeypatch.setattr(hub.constants, "HF_HUB_OFFLINE", True)
    questions = asked(monkeypatch, Answer())
    assert not hub.hub_answers()
    assert not questions


def test_an_endpoint_that_is_no_web_address_is_left_to_the_hub(monkeypatch):
    monkeypatch.setenv("HF_ENDPOINT", "file:///etc")
    questions = asked(monkeypatch, Answer())
    assert hub.hub_answers()
    assert not questions
