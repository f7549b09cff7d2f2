"""The helper process that speaks: it alone loads espeak-ng (GPL), by ctypes; ``python -m`` it, never import it.

One JSON request a line on stdin, ``{text, voice, pitch, rate}``; for each, one JSON line on stdout,
``{rate, num_bytes, phones}`` or ``{error}``, then ``num_bytes`` of 16-bit samples. ``phones`` are
[sample, mnemonic, place], the place where the phone's word begins in the text, in characters from 0.

espeak keeps state from one utterance to the next and its output bytes with it. Each utterance is therefore spoken by a
fresh child of this process, which has not loaded the library itself: 10 ms instead of the 0.1 s of a new interpreter.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
from typing import Any

SYNCHRONOUS = 2  # AUDIO_OUTPUT_SYNCHRONOUS
PHONEME_EVENTS = 1  # espeakINITIALIZE_PHONEME_EVENTS
RATE, PITCH = 1, 3  # espeak_PARAMETER
EVENT_END, EVENT_PHONEME = 0, 7  # espeak_EVENT_TYPE
UTF8 = 1


class _Id(ctypes.Union):
    _fields_ = [("number", ctypes.c_int), ("name", ctypes.c_char_p), ("string", ctypes.c_char * 8)]


class _Event(ctypes.Structure):
    _fields_ = [
        ("type", ctypes.c_int),
        ("unique_identifier", ctypes.c_uint),
        ("text_position", ctypes.c_int),
        ("length", ctypes.c_int),
        ("audio_position", ctypes.c_int),
        ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p),
        ("id", _Id),
    ]


_Callback = ctypes.CFUNCTYPE(ctypes.c_int, ctypes.POINTER(ctypes.c_short), ctypes.c_int, ctypes.POINTER(_Event))


def speak(library: str, data: str, request: dict[str, Any]) -> tuple[int, bytes, list[tuple[int, str, int]]]:
    """Load the library and speak one request; return (samples a second, 16-bit samples, phones as above)."""
    espeak = ctypes.CDLL(library)
    rate = espeak.espeak_Initialize(SYNCHRONOUS, 0, os.fsencode(data), PHONEME_EVENTS)
    if rate <= 0:
        raise RuntimeError(f"espeak-ng finds no data in {data}; install espeakng-loader again")
    if espeak.espeak_SetVoiceByName(request["voice"].encode()) != 0:
        raise RuntimeError(f"espeak-ng has no voice {request['voice']!r}")
    espeak.espeak_SetParameter(RATE, request["rate"], 0)
    espeak.espeak_SetParameter(PITCH, request["pitch"], 0)
    samples = bytearray()
    phones: list[tuple[int, str, int]] = []

    def receive(wave: Any, count: int, events: Any) -> int:
        if count > 0:
            samples.extend(ctypes.string_at(wave, 2 * count))
        index = 0
        while events[index].type != EVENT_END:
            event = events[index]
            if event.type == EVENT_PHONEME:
                # Eight bytes without a closing zero when the mnemonic is that long.
                raw = ctypes.string_at(ctypes.addressof(event.id), 8)
                mnemonic = raw.split(b"\0")[0].decode("utf-8", "replace")
                phones.append((event.sample, mnemonic, event.text_position - 1))
            index += 1
        return 0

    callback = _Callback(receive)
    espeak.espeak_SetSynthCallback(callback)
    text = request["text"].encode() + b"\0"
    status = espeak.espeak_Synth(text, len(text), 0, 1, 0, UTF8, None, None)
    if status != 0 or not samples:
        raise RuntimeError(f"espeak-ng could not speak {request['text']!r} (status {status}, {len(samples)} bytes)")
    return rate, bytes(samples), phones


def _answer(library: str, data: str, line: bytes) -> bytes:
    try:
        rate, samples, phones = speak(library, data, json.loads(line))
    except (RuntimeError, OSError, ValueError, KeyError) as error:
        return json.dumps({"error": str(error)}).encode() + b"\n"
    return json.dumps({"rate": rate, "num_bytes": len(samples), "phones": phones}).encode() + b"\n" + samples


def _answer_in_child(library: str, data: str, line: bytes) -> bytes:
    """Fork, answer there, and return what the child wrote."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reading)
        with os.fdopen(writing, "wb") as pipe:
            pipe.write(_answer(library, data, line))
        os._exit(0)  # no clean-up: the parent's buffers are not this child's to flush
    os.close(writing)
    with os.fdopen(reading, "rb") as pipe:
        answer = pipe.read()
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status != 0:
        return json.dumps({"error": f"espeak-ng died with status {status} on {line.decode()!r}"}).encode() + b"\n"
    return answer


def main() -> None:
    """Answer requests until stdin closes."""
    import espeakng_loader

    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the caller's: it closes stdin and this process ends
    library = espeakng_loader.get_library_path()
    data = os.path.dirname(espeakng_loader.get_data_path())  # espeak adds espeak-ng-data itself
    for line in sys.stdin.buffer:
        sys.stdout.buffer.write(_answer_in_child(library, data, line))
        sys.stdout.buffer.flush()


if __name__ == "__main__":
    main()
