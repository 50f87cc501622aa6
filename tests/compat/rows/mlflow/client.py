"""The client of an MLflow model as its manual has it: requests to /invocations, in each of its forms."""

import sys

import requests

base, key = sys.argv[1:]
headers = {"Authorization": f"Bearer {key}"}
forms = [
    {"dataframe_split": {"columns": ["values"], "data": [[1.5], [2.5]]}},
    {"dataframe_records": [{"values": 1.5}, {"values": 2.5}]},
]
with requests.Session() as session:
    for path in ["/invocations", "/score"]:
        for form in forms:
            answer = session.post(base + path, json=form, headers=headers, timeout=60)
            assert answer.status_code == 200, (path, answer.status_code, answer.text)
            assert answer.json()["predictions"]["sum"] == 4.0, (path, answer.text)
    csv = session.post(
        base + "/invocations", data="values\n1.5\n2.5\n", headers=headers | {"Content-Type": "text/csv"}, timeout=60
    )
    assert csv.status_code == 200 and csv.json()["predictions"]["sum"] == 4.0, (csv.status_code, csv.text)
    version = session.get(base + "/version", headers=headers, timeout=60)
    assert version.status_code == 200 and version.text.count(".") >= 2, (version.status_code, version.text)
