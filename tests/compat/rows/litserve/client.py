"""The client of a model with JSON of its own: requests, with nothing of Penstock but the address and the key."""

import sys

import requests

base, key = sys.argv[1:]
headers = {"Authorization": f"Bearer {key}"}
with requests.Session() as session:
    for path in ["/predict", "/score"]:
        answer = session.post(base + path, json={"values": [1.5, 2.5]}, headers=headers, timeout=60)
        assert answer.status_code == 200, (path, answer.status_code, answer.text)
        assert answer.json()["sum"] == 4.0, (path, answer.text)
