"""A model behind LitServe, as its manual writes one."""

import argparse
import os
import time

import litserve


class Model(litserve.LitAPI):
    def setup(self, device):
        pass

    def predict(self, request):
        time.sleep(request.get("seconds", 0))
        return {"pid": os.getpid(), "revision": os.environ.get("REVISION"), "sum": sum(request["values"])}


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--host", required=True)
    arguments.add_argument("--port", type=int, required=True)
    arguments = arguments.parse_args()
    server = litserve.LitServer(Model(), accelerator="cpu", restart_workers=True)
    server.run(host=arguments.host, port=arguments.port, generate_client_file=False)
