"""Snakemake's executor for Kubernetes where the pods share a volume, so that no object store is asked for.

Its own settings say that nothing is shared, and no option changes that (`implies_no_shared_fs`). Besides, a job starts
in the study's folder, and the log of a failed pod is asked for rightly.
"""

import shlex
from dataclasses import replace

import snakemake_executor_plugin_kubernetes as plugin

ExecutorSettings = plugin.ExecutorSettings
common_settings = replace(
    plugin.common_settings,
    implies_no_shared_fs=False,
    job_deploy_sources=False,
    auto_deploy_default_storage_provider=False,
)


class Executor(plugin.Executor):
    def __post_init__(self):
        super().__post_init__()
        read = self.kubeapi.read_namespaced_pod_log
        # It asks for a container before the one that failed. There is none, and that error would end the whole study.
        self.kubeapi.read_namespaced_pod_log = lambda previous, **pod: read(**pod)

    def get_job_exec_prefix(self, job):
        return f"cd {shlex.quote(self.workflow.workdir_init)}"
