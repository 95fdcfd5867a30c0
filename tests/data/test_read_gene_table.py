import http.server
import threading

import pytest

from scbert.data import read_gene_table
from scbert.data.read_gene_table import fetch_hgnc, load_gene_table
from scbert.tokenization import InputError

pytest.importorskip("pooch")

TABLE = b"hgnc_id\tsymbol\tstatus\talias_symbol\tprev_symbol\tensembl_gene_id\nHGNC:1\tA\tApproved\tB\t\t\n"


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("SCBERT_CACHE", str(tmp_path))


@pytest.fixture
def site(monkeypatch):
    """A web site of one file on this machine in the place of HGNC's; counts its visitors."""

    class Handler(http.server.BaseHTTPRequestHandler):
        visits = 0

        def do_GET(self):
            Handler.visits += 1
            self.send_response(200)
            self.send_header("Content-Length", str(len(TABLE)))
            self.end_headers()
            self.wfile.write(TABLE)

        def log_message(self, *args):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}/hgnc_complete_set.txt"
    monkeypatch.setattr(read_gene_table, "HGNC_URL", url)
    yield Handler
    server.shutdown()
    server.server_close()


def test_downloaded_once_and_held_to_its_checksum(site):
    path = fetch_hgnc()
    assert path.read_bytes() == TABLE and fetch_hgnc() == path and site.visits == 1
    path.write_bytes(TABLE[:-5])
    with pytest.raises(InputError, match="does not have the checksum"):
        fetch_hgnc()


def test_wrong_checksum_is_refused(tmp_path, site):
    (tmp_path / "hgnc_complete_set.txt.sha256").write_text("0" * 64)
    with pytest.raises(InputError, match="download of .* checksum"):
        fetch_hgnc()
    assert not (tmp_path / "hgnc_complete_set.txt").exists()


def test_offline_says_what_to_do(tmp_path, monkeypatch):
    # the port is closed: nobody listens on port 1
    monkeypatch.setattr(read_gene_table, "HGNC_URL", "http://127.0.0.1:1/hgnc_complete_set.txt")
    with pytest.raises(InputError, match="--gene-table"):
        fetch_hgnc()
    (tmp_path / "hgnc_complete_set.txt").write_bytes(TABLE)
    assert len(load_gene_table("hgnc")) == 1


def test_a_table_of_ones_own(tmp_path):
    (tmp_path / "mine.txt").write_bytes(TABLE)
    assert load_gene_table(tmp_path / "mine.txt").resolve("B") == (("HGNC:1",), "alias")
