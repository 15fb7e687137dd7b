"""The two scoring tools that need Java: METEOR 1.5 and the Penn Treebank tokenizer, from the jars in pycocoevalcap.

pycocoevalcap's own wrappers keep METEOR's error pipe unread, so that it can fill and block, and write into
site-packages to tokenize. Here every process has a time limit, is always reaped, and fails with a reason.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import subprocess
import tempfile
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import numpy as np
from numpy.typing import NDArray

MISSING = "no Java found on PATH or under JAVA_HOME"

# UTF-8 and a decimal point on every machine, because METEOR parses numbers by the locale.
_LOCALE_OPTIONS = ("-Dfile.encoding=UTF-8", "-Dstdout.encoding=UTF-8", "-Duser.language=en", "-Duser.country=US")
_METEOR_JAR = "meteor/meteor-1.5.jar"
_METEOR_PARAPHRASES = "meteor/data/paraphrase-en.gz"
_PTB_JAR = "tokenizer/stanford-corenlp-3.4.1.jar"
# The start takes seconds (a 60 MB table is read), a report milliseconds. Both limits are enough for a slow machine.
_START_LIMIT_S = 180.0
_LIMIT_PER_TEXT_S = 0.25

# METEOR 1.5's parameters for English: alpha weighs recall, beta and gamma punish fragments, delta (here _CONTENT)
# weighs content words, and a match counts by its matcher: exact, stem, synonym, paraphrase.
_ALPHA, _BETA, _GAMMA, _CONTENT = 0.85, 0.2, 0.6, 0.75
_MATCHERS = (1.0, 0.6, 0.8, 0.6)
_COUNTS = 23


class JavaFailure(Exception):
    """A Java tool is missing or did not answer; the message is the reason, without a full stop."""


def java_path() -> str | None:
    """Returns the path of Java: in `JAVA_HOME` if it exists there, else on `PATH`; None without Java."""
    home = os.environ.get("JAVA_HOME")
    if home and (found := shutil.which("java", path=str(Path(home) / "bin"))):
        return found
    return shutil.which("java")


def meteor(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> float:
    """Returns METEOR 1.5 of a corpus of English text, normalised, as pycocoevalcap computes it.

    Args:
        references: At least one reference for each hypothesis.
        hypotheses: One text for each item.

    Raises:
        JavaFailure: Java or a jar is missing, Java crashes, its answer is not a number, or it takes too long.

    Source: Denkowski and Lavie, "Meteor Universal" (2014).
    """
    with _meteor_process(len(hypotheses)) as ask:
        lines = [_pair(ask, texts, hypothesis) for texts, hypothesis in zip(references, hypotheses, strict=True)]
        # One score for each item, then the score of the corpus, which is not their mean.
        return _number(ask(" ||| ".join(["EVAL", *lines]), len(hypotheses) + 1)[-1])


def statistics(references: Sequence[Sequence[str]], hypotheses: Sequence[str]) -> NDArray[np.float64]:
    """Returns METEOR's counts for each pair, `[n, 23]`; `combine` computes scores from sums. Equal pairs run once.

    Raises:
        JavaFailure: As `meteor`.
    """
    pairs = list(zip(map(tuple, references), hypotheses, strict=True))
    distinct = dict.fromkeys(pairs)
    with _meteor_process(len(distinct)) as ask:
        counted = {pair: [float(value) for value in _pair(ask, *pair).split()] for pair in distinct}
    if any(len(counts) != _COUNTS for counts in counted.values()):
        raise JavaFailure("METEOR's answer does not have the counts of version 1.5")
    counts = np.array([counted[pair] for pair in pairs], np.float64).reshape(len(pairs), _COUNTS)
    # In a corpus, METEOR counts no chunks for a pair of equal texts.
    equal = (counts[:, 20] == 1) & (counts[:, 21] == counts[:, 0]) & (counts[:, 22] == counts[:, 1])
    counts[equal, 20] = 0
    return counts


def combine(sums: NDArray[np.float64]) -> NDArray[np.float64]:
    """Returns METEOR of a corpus `[...]` from sums `[..., 23]` of the counts of its pairs, with English parameters.

    The counts: length and function words of both sides, for each of four matchers the matched content and function
    words of both sides, chunks, and matched words of both sides.
    """
    weights = np.array(_MATCHERS)
    matched = sums[..., 4:20].reshape(*sums.shape[:-1], 4, 4)
    share = np.array([_CONTENT, _CONTENT, 1 - _CONTENT, 1 - _CONTENT])
    weighted = np.einsum("...mk,m,k->...k", matched, weights, share)  # content and function words of test, reference
    found, covered = weighted[..., 0] + weighted[..., 2], weighted[..., 1] + weighted[..., 3]
    lengths = [_CONTENT * (sums[..., i] - sums[..., i + 2]) + (1 - _CONTENT) * sums[..., i + 2] for i in (0, 1)]
    with np.errstate(divide="ignore", invalid="ignore"):
        precision, recall = found / lengths[0], covered / lengths[1]
        mean = 1 / ((1 - _ALPHA) / precision + _ALPHA / recall)
        fragments = sums[..., 20] / ((sums[..., 21] + sums[..., 22]) / 2)
    scores: NDArray[np.float64] = np.nan_to_num(mean * (1 - _GAMMA * fragments**_BETA), nan=0.0)
    return scores


def _meteor_process(pairs: int) -> contextlib.AbstractContextManager[_Ask]:
    jar = _bundled(_METEOR_JAR)
    _bundled(_METEOR_PARAPHRASES)  # the jar reads this file beside it, and scores differently without it
    command = [_java(), *_LOCALE_OPTIONS, "-XX:+UseSerialGC", "-Xmx2G", "-jar", str(jar)]
    command += ["-", "-", "-stdio", "-l", "en", "-norm"]
    return _conversation(command, cwd=jar.parent, limit_s=_limit(pairs))


def _pair(ask: _Ask, texts: Sequence[str], hypothesis: str) -> str:
    line = " ||| ".join(["SCORE", *map(_one_field, texts), _one_field(hypothesis)])
    return " ".join(str(_number(value)) for value in ask(line, 1)[0].split())


def ptb_tokenize(texts: Sequence[str]) -> list[str]:
    """Returns texts as the Penn Treebank tokenizer splits them, lower-cased and without punctuation.

    Brackets stay as `-lrb-` and `-rrb-`, as in published scores: pycocoevalcap removes only the upper-case forms.

    Raises:
        JavaFailure: Java or a jar is missing, Java crashes, or it takes too long.
    """
    from pycocoevalcap.tokenizer.ptbtokenizer import PUNCTUATIONS

    jar = _bundled(_PTB_JAR)
    command = [_java(), *_LOCALE_OPTIONS, "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    command += ["-encoding", "UTF-8", "-preserveLines", "-lowerCase"]
    lines = "".join(f"{' '.join(text.split())}\n" for text in texts)
    try:
        # `run` reads both pipes while it writes, and kills the process at the limit or on Ctrl-C.
        done = subprocess.run(command, input=_encode(lines), capture_output=True, timeout=_limit(len(texts)))
    except subprocess.TimeoutExpired:
        raise JavaFailure(f"the PTB tokenizer gave no answer within {_limit(len(texts)):.0f} s") from None
    except OSError as error:
        raise JavaFailure(f"Java does not start ({error})") from error
    if done.returncode:
        raise JavaFailure(_reason(done.stderr, done.returncode))
    answers = done.stdout.decode("utf-8", "replace").split("\n")[:-1]
    if len(answers) != len(texts):
        raise JavaFailure(f"the PTB tokenizer returned {len(answers)} lines for {len(texts)} texts")
    punctuation = set(PUNCTUATIONS)
    return [" ".join(word for word in line.split() if word not in punctuation) for line in answers]


def _java() -> str:
    java = java_path()
    if java is None:
        raise JavaFailure(MISSING)
    return java


def _bundled(name: str) -> Path:
    """Returns a file of the installed pycocoevalcap package."""
    spec = importlib.util.find_spec("pycocoevalcap")
    if spec is None or not spec.submodule_search_locations:
        raise JavaFailure("the package pycocoevalcap is not installed")
    path = Path(spec.submodule_search_locations[0]) / name
    if not path.is_file():
        raise JavaFailure(f"{path} is missing; reinstall pycocoevalcap")
    return path


def _limit(texts: int) -> float:
    return _START_LIMIT_S + _LIMIT_PER_TEXT_S * texts


def _one_field(text: str) -> str:
    """Returns the text without line breaks and field separators, so that METEOR reads it as one field of a line."""
    return " ".join(re.sub(r"\|{3,}", " ", text).split())


def _encode(text: str) -> bytes:
    return text.encode("utf-8", "replace")


def _number(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        raise JavaFailure(f"METEOR answered {text[:80]!r} where a number was expected") from None
    # If neither side has words to match, METEOR computes 0 / 0; such an item counts as no match.
    return 0.0 if value != value else value


class _Ask:
    """Sends one line to the process and waits for its answer, line by line, so that neither pipe can fill."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        assert process.stdin is not None
        assert process.stdout is not None
        self._input: IO[bytes] = process.stdin
        self._output: IO[bytes] = process.stdout

    def __call__(self, line: str, answers: int) -> list[str]:
        self._input.write(_encode(line + "\n"))
        self._input.flush()
        lines = []
        for _ in range(answers):
            answer = self._output.readline()
            if not answer:
                raise EOFError
            lines.append(answer.decode("utf-8", "replace").strip())
        return lines


@contextlib.contextmanager
def _conversation(command: list[str], *, cwd: Path, limit_s: float) -> Iterator[_Ask]:
    """Starts a process that answers each line with lines, and ends it after the block, also after an error."""
    # Errors go to a file: an unread pipe blocks the process once it is full.
    with tempfile.TemporaryFile() as errors:
        try:
            process = subprocess.Popen(command, cwd=cwd, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors)
        except OSError as error:
            raise JavaFailure(f"Java does not start ({error})") from error
        late = threading.Event()

        def stop() -> None:
            late.set()
            process.kill()

        timer = threading.Timer(limit_s, stop)
        timer.daemon = True
        timer.start()
        try:
            yield _Ask(process)
        except (EOFError, OSError):
            if late.is_set():
                raise JavaFailure(f"METEOR gave no answer within {limit_s:.0f} s and was stopped") from None
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(timeout=5)
            errors.seek(0)
            raise JavaFailure(_reason(errors.read(), process.poll())) from None
        finally:
            timer.cancel()
            process.kill()
            for pipe in (process.stdin, process.stdout):
                with contextlib.suppress(OSError):  # closing flushes what a dead process never read
                    if pipe is not None:
                        pipe.close()
            process.wait()


def _reason(stderr: bytes, code: int | None) -> str:
    """Returns the first informative line of Java's error output, with the exit status."""
    lines = (line.strip() for line in stderr.decode("utf-8", "replace").splitlines())
    messages = [line for line in lines if line and not line.startswith(("Picked up ", "at "))]
    status = "Java stopped" if code is None else f"Java stopped with status {code}"
    return f"{status}: {messages[0][:200]}" if messages else status
