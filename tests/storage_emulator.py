"""A bucket of Google Cloud Storage on the loopback address: gcp-storage-emulator, with the generations it leaves out.

TensorStore, which writes the numbers of checkpoints, reads an object's generation off a header, and writes only over
the generation that it has read.
"""

import contextlib
from collections.abc import Iterator
from http import HTTPStatus

from gcp_storage_emulator.exceptions import NotFound
from gcp_storage_emulator.handlers import objects

BUCKET = "bucket"


def _generation(storage, bucket: str, name: str) -> str:
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except NotFound:
        return "0"


def _download(request, response, storage, *args, **kwargs):
    response["x-goog-generation"] = _generation(storage, request.params["bucket_name"], request.params["object_id"])
    return _plain_download(request, response, storage, *args, **kwargs)


def _insert(request, response, storage, *args, **kwargs):
    wanted, name = request.query.get("ifGenerationMatch"), request.query.get("name")
    if wanted and name and wanted[0] != _generation(storage, request.params["bucket_name"], name[0]):
        response.status = HTTPStatus.PRECONDITION_FAILED
        return None
    return _plain_insert(request, response, storage, *args, **kwargs)


_plain_download, objects.download = objects.download, _download
_plain_insert, objects.insert = objects.insert, _insert
from gcp_storage_emulator import server  # noqa: E402  its table of routes takes the functions when it is imported: after they are replaced


@contextlib.contextmanager
def running() -> Iterator[dict[str, str]]:
    """Runs it; gives the environment in which gcsfs, Google's client and TensorStore take it for the real one."""
    emulator = server.create_server("127.0.0.1", 0, in_memory=True, default_bucket=BUCKET)
    emulator.start()
    emulator._api._httpd.handle_error = lambda *_: None  # gcsfs hangs up where it needs no answer any more
    address = f"http://127.0.0.1:{emulator._api._httpd.server_address[1]}"
    environment = {"STORAGE_EMULATOR_HOST": address, "TENSORSTORE_GCS_HTTP_URL": address}
    environment["GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT"] = "false"  # asks Google what kind of bucket it is
    try:
        yield environment
    finally:
        emulator.stop()
