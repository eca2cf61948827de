"""A stand-in for a Kubernetes cluster: what Snakemake's executor asks of its API. A pod is a process on this machine.

It has no more of its parent than a pod would: a folder of its own, the environment that its container names, and this
disk as its volume. The cluster loses a node: the first training that has a checkpoint is killed, and its pod is gone.
And the first evaluation is killed as if it had taken too much memory: its pod stays, with a log.
"""

import base64
import json
import os
import subprocess
import tempfile
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, urlsplit

from tests.study.scheduler import end


class RefusedError(Exception):
    """A status of HTTP and what is said."""


class Cluster:
    """jobs: what was asked for, by name. lost, failed: the names of those that were killed.

    A request's method and path name the function that answers it.
    """

    def __init__(self, folder, runs):
        self.folder, self.runs, self.lost, self.failed = folder, runs, None, None
        self.secrets, self.jobs, self.pods, self.deleted = {}, {}, {}, []
        folder.mkdir()
        answers = type("Answers", (Handler,), {"cluster": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), answers)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        lists = {
            "clusters": {"cluster": {"server": f"http://127.0.0.1:{self.server.server_port}"}},
            "contexts": {"context": {"cluster": "it", "user": "it"}},
            "users": {"user": {}},
        }
        told = {kind: [{"name": "it"} | value] for kind, value in lists.items()}
        self.config = folder / "config"
        self.config.write_text(json.dumps({"apiVersion": "v1", "kind": "Config", "current-context": "it"} | told))

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        for name in [*self.pods]:
            self.delete_pods(name)

    def kill(self):
        begun = [path.parts[-4:-1] for path in self.runs.glob("*/*/*/seed*/checkpoint.pt")]
        for name, pod in [*self.pods.items()]:
            command = container_of(self.jobs[name])["args"][-1]
            if not self.lost and any(f"10_train:folder={'/'.join(folder)}'" in command for folder in begun):
                self.lost = name
                self.delete_pods(name)
            elif not self.failed and "--target-jobs '20_evaluate" in command:
                self.failed = name
                end(pod)

    def post_secrets(self, body):
        self.secrets[body["metadata"]["name"]] = body["data"]

    def delete_secrets(self, name):
        del self.secrets[name]

    def post_jobs(self, body):
        name, container = body["metadata"]["name"], container_of(body)
        requests, limits = (container["resources"].get(kind, {}) for kind in ("requests", "limits"))
        if any("/" in what and limits.get(what) != amount for what, amount in requests.items()):
            raise RefusedError(422, "Limit must be set for non overcommitable resources")  # an API server's words
        keys = {one["name"]: one["valueFrom"]["secretKeyRef"] for one in container["env"]}
        values = {name: base64.b64decode(self.secrets[of["name"]][of["key"]]).decode() for name, of in keys.items()}
        with open(self.folder / f"{name}.log", "w") as log:
            how = {"env": {"PATH": os.defpath} | values, "stdout": log, "stderr": log, "start_new_session": True}
            command = [*container["command"], *container["args"]]
            self.pods[name] = subprocess.Popen(command, cwd=tempfile.mkdtemp(dir=self.folder), **how)
        self.jobs[name] = body
        return body

    def get_jobs_status(self, name):
        if name not in self.jobs or name in self.deleted:
            raise RefusedError(404, "not found")
        self.kill()
        code = self.pods[name].poll() if name in self.pods else 137
        return self.jobs[name] | {"status": {} if code is None else {"failed": 1} if code else {"succeeded": 1}}

    def delete_jobs(self, name):
        self.deleted.append(name)
        if name in self.pods:
            self.delete_pods(name)

    def get_pods(self, name):
        if name not in self.pods:
            return {"items": []}
        code = self.pods[name].poll()
        state = {"running": {}} if code is None else {"terminated": {"exitCode": code}}
        container = {"name": "snakemake", "state": state, "image": "", "imageID": "", "ready": True, "restartCount": 0}
        return {"items": [{"metadata": {"name": name}, "status": {"containerStatuses": [container]}}]}

    def get_pods_log(self, name, previous=False):
        if previous:
            raise RefusedError(400, f'previous terminated container "snakemake" in pod "{name}" not found')  # kubelet's
        return (self.folder / f"{name}.log").read_text()

    def delete_pods(self, name):
        pod = self.pods.pop(name)
        if pod.poll() is None:
            end(pod)


def container_of(job):
    return job["spec"]["template"]["spec"]["containers"][0]


class Handler(BaseHTTPRequestHandler):
    def answer(self):
        asked = urlsplit(self.path)
        query = parse_qs(asked.query)
        kind, *rest = asked.path.partition("/namespaces/default/")[2].split("/")
        body = json.loads(self.rfile.read(int(self.headers.get("Content-Length", 0))) or "{}")
        name = [*rest, *query.get("labelSelector", []), ""][0].removeprefix("job-name=")
        more = {"previous": True} if "previous" in query else {}
        try:
            function = getattr(self.cluster, "_".join([self.command.lower(), kind, *rest[1:]]))
            told, status = function(body if self.command == "POST" else name, **more), 200
        except RefusedError as error:
            status, told = error.args[0], {"message": error.args[1]}
        text = told if isinstance(told, str) else json.dumps(told or {})
        self.send_response(status)
        self.end_headers()
        self.wfile.write(text.encode())

    do_GET = do_POST = do_DELETE = answer  # noqa: N815

    def log_message(self, *_):
        pass
