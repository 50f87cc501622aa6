"""A chat model behind LitServe's OpenAI-compatible server: the protocol is LitServe's, the model counts."""

import argparse
import os
import time

import litserve


class Model(litserve.LitAPI):
    def setup(self, device):
        pass

    def predict(self, request):
        yield f"pid={os.getpid()} revision={os.environ.get('REVISION')} words:"
        # The words of the last message come back one by one.
        words = request.messages[-1].content.split()
        for word in words:
            time.sleep(0.02)
            yield f" {word}"


if __name__ == "__main__":
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--host", required=True)
    arguments.add_argument("--port", type=int, required=True)
    arguments = arguments.parse_args()
    server = litserve.LitServer(Model(spec=litserve.OpenAISpec()), accelerator="cpu", restart_workers=True)
    server.run(host=arguments.host, port=arguments.port, generate_client_file=False)
