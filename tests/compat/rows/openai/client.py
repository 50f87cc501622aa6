"""OpenAI's own client: an answer at once, and one as a stream."""

import sys
import time

import openai

base, key = sys.argv[1:]
client = openai.OpenAI(base_url=f"{base}/v1", api_key=key, max_retries=0, timeout=60)
messages = [{"role": "user", "content": "one two three four five six seven eight nine ten"}]

whole = client.chat.completions.create(model="echo", messages=messages)
assert whole.choices[0].message.content.endswith("nine ten"), whole

begun = time.monotonic()
pieces, times = [], []
for event in client.chat.completions.create(model="echo", messages=messages, stream=True):
    if event.choices and event.choices[0].delta.content:
        pieces.append(event.choices[0].delta.content)
        times.append(time.monotonic() - begun)
assert "".join(pieces).endswith("nine ten"), pieces
# The model takes 20 ms for each word: the first ones come before the last one is made.
assert len(pieces) > 5 and times[-1] - times[0] > 0.1, f"it came all at once: {times}"

try:
    client.chat.completions.create(model="echo", messages=[])
    raise AssertionError("a request without messages was answered")
except openai.APIStatusError as error:
    # The server's own answer, in a form that this client reads.
    assert error.response.headers["penstock-error-code"] == "model-error", error.response.headers
    assert error.status_code >= 400 and error.body, error
try:
    openai.OpenAI(base_url=f"{base}/v1", api_key="wrong", max_retries=0).models.list()
    raise AssertionError("a wrong key was accepted")
except openai.AuthenticationError as error:
    assert error.body and error.body["message"], error.body
