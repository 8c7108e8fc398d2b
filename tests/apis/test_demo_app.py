"""The page to try a model, in a real browser, and what strangers may do to it."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import ROOT, import_tool, run_python
from mmengine.config import Config
from PIL import Image

from mmsvit.apis.inference import ImageModel

CONFIG = ROOT / 'configs' / 'svit_maskrcnn_shapes.py'
TOOL = 'tools/demo_app.py'
needs_gradio = pytest.mark.skipif(
    find_spec('gradio') is None, reason='gradio is not installed: pip install "gradio==6.31.0"'
)


@pytest.fixture(scope='module')
def checkpoint(tmp_path_factory) -> Path:
    """A model that finds squares everywhere."""
    torch.manual_seed(0)
    model = ImageModel(Config.fromfile(CONFIG)).model
    model.roi_head.bbox_head.fc_cls.bias.data[1] = 5
    path = tmp_path_factory.mktemp('demo') / 'squares.pth'
    torch.save(dict(state_dict=model.state_dict()), path)
    return path


@pytest.fixture(scope='module')
def address(checkpoint, tmp_path_factory) -> Iterator[str]:
    """Where the tool serves the page; files of at most 200 kB, images of at most 40 000 pixels."""
    log = tmp_path_factory.mktemp('server') / 'log'
    kept = tmp_path_factory.mktemp('kept')
    limits = ['--max-bytes', '200000', '--max-pixels', '40000']
    command = [sys.executable, TOOL, '--config', CONFIG, '--checkpoint', checkpoint, *limits]
    env = {key: value for key, value in os.environ.items() if key != 'PYTHONPATH'}
    env['TMPDIR'] = str(kept)
    # What others have set must not open the page.
    env.update(GRADIO_ALLOWED_PATHS=f'{ROOT},/etc', GRADIO_SHARE='1', GRADIO_SERVER_NAME='0.0.0.0')
    env['GRADIO_PROFILING'] = '1'
    with log.open('w') as output:
        server = subprocess.Popen(
            list(map(str, command)),
            cwd=ROOT,
            env=env,
            stdout=subprocess.PIPE,
            stderr=output,
            text=True,
        )
    try:
        for line in server.stdout:
            found = re.search(r'The page is at (\S+)', line)
            if found:
                break
        else:
            pytest.fail(log.read_text()[-3000:])
        assert list(kept.glob('mmsvit-demo-*'))
        yield found.group(1)
    finally:
        server.terminate()
        server.wait(30)
        server.stdout.close()
    assert server.returncode == 128 + signal.SIGTERM
    assert not list(kept.glob('mmsvit-demo-*'))
    said = log.read_text()
    # gradio logs where it refused a file of the server's own; nothing else may go wrong.
    assert said.count('Traceback') == said.count('it was not uploaded by a user')


@pytest.fixture
def page(address) -> Iterator:
    """The page in Chromium, which may reach nothing but the page's own server."""
    sync_api = pytest.importorskip('playwright.sync_api', reason='playwright is not installed')
    browser = shutil.which('chromium') or shutil.which('google-chrome')
    if browser is None:
        pytest.skip('chromium is not on the PATH')
    with sync_api.sync_playwright() as playwright:
        # Chromium's sandbox does not start for root, as in containers.
        chromium = playwright.chromium.launch(executable_path=browser, args=['--no-sandbox'])
        page = chromium.new_page(viewport=dict(width=1300, height=1000))
        requests = []
        page.on('request', lambda request: requests.append(request.url))
        page.goto(address)
        page.wait_for_selector('#file input[type=file]', state='attached')
        yield page
        chromium.close()
    elsewhere = [url for url in requests if not url.startswith((address, 'data:', 'blob:'))]
    assert not elsewhere


def pixels(page, name: str) -> np.ndarray:
    """A picture of the page, as large as it came."""
    source = page.evaluate(f'document.querySelector("#{name} img").src')
    with urllib.request.urlopen(source) as answer:
        return np.asarray(Image.open(answer).convert('RGB')).astype(int)


@pytest.mark.promise(
    'Safety',
    'The demo page accepts files and images up to a limit of bytes and pixels, and continues '
    'after bad ones',
    'a text file, 60,000 pixels of 40,000, 300 kB of 200 kB: 3 refused of 3',
)
@needs_gradio
def test_page_shows_boxes_super_tokens_and_attention(page, tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / 'noise.png')
    page.set_input_files('#file input[type=file]', tmp_path / 'noise.png')
    for name in ('picture', 'prediction', 'super-tokens-1', 'colours-2', 'attention-4'):
        page.wait_for_selector(f'#{name} img')
    page.get_by_text('In figures').click()
    assert 'square' in page.inner_text('#found')
    green = np.array([60, 180, 75])  # The palette's colour of squares.
    assert (np.abs(pixels(page, 'prediction') - green).max(axis=2) < 30).mean() > 0.01

    before = {name: pixels(page, name) for name in ('picture', 'attention-1')}
    sources = {name: page.get_attribute(f'#{name} img', 'src') for name in before}
    box = page.locator('#picture img').bounding_box()
    page.click('#picture img', position=dict(x=40, y=90))
    for name, source in sources.items():
        changed = '([name, source]) => document.querySelector(`#${name} img`).src != source'
        page.wait_for_function(changed, arg=[name, source])
        # The ring has left the middle, and is where the click was.
        after = pixels(page, name)
        height, width = after.shape[:2]
        rows, columns = np.nonzero((after.min(axis=2) > 240) & (before[name].min(axis=2) <= 240))
        near = np.hypot(rows - 90 * height / box['height'], columns - 40 * width / box['width'])
        assert (near < 20).sum() > 30
        if name == 'picture':
            assert (near < 20).all()

    # What is wrong gets a message, and the page goes on.
    (tmp_path / 'text.jpg').write_text('no image at all')
    page.set_input_files('#file input[type=file]', tmp_path / 'text.jpg')
    page.wait_for_selector('#message :text("not an image, or corrupt")')
    Image.new('RGB', (300, 200)).save(tmp_path / 'large.png')
    page.set_input_files('#file input[type=file]', tmp_path / 'large.png')
    page.wait_for_selector('#message :text("300 x 200 pixels")')
    (tmp_path / 'heavy.jpg').write_bytes(bytes(300_000))
    page.set_input_files('#file input[type=file]', tmp_path / 'heavy.jpg')
    page.wait_for_selector(':text("exceed the maximum allowed size")')
    page.set_input_files('#file input[type=file]', tmp_path / 'noise.png')
    page.wait_for_selector('#prediction img')


@needs_gradio
def test_what_the_model_does_not_bear_gets_a_message(caplog):
    from mmsvit.apis.demo_page import build_page

    class Failing:
        attentions = ()

        def look(self, path: str) -> None:
            raise ValueError('need at least one array to stack')

    page = build_page(Failing(), 'a page')
    look = next(event.fn for event in page.fns.values() if event.api_name == 'look')
    answer = {component.elem_id: value for component, value in look('photo.png').items()}
    assert 'failed on this image' in answer['message'].value
    assert 'need at least one array to stack' in caplog.text


@pytest.mark.parametrize(
    ('option', 'value', 'message'),
    [
        ('--port', '99999', 'a number from 1 to 65535'),
        ('--checkpoint', 'none.pth', 'no such checkpoint: none.pth'),
        ('--max-bytes', '0', 'must be 1 or more'),
    ],
)
def test_options_are_checked_before_the_model_is_loaded(
    option, value, message, monkeypatch, capsys
):
    options = {'--config': CONFIG, '--checkpoint': CONFIG, option: value}
    arguments = [str(part) for pair in options.items() for part in pair]
    monkeypatch.setattr('sys.argv', [TOOL, *arguments])
    with pytest.raises(SystemExit):
        import_tool('demo_app').parse_args()
    assert message in capsys.readouterr().err


@pytest.mark.promise(
    'Load',
    '8 concurrent clients of the demo page get their own answers',
    '8 of 8',
)
@needs_gradio
def test_concurrent_requests_get_their_own_answers(address, tmp_path):
    from gradio_client import Client, handle_file

    def ask(i: int) -> np.ndarray:
        Image.new('RGB', (64, 64), (30 * i, 255 - 30 * i, 128)).save(tmp_path / f'{i}.png')
        client = Client(address, verbose=False, download_files=str(tmp_path / str(i)))
        answer = client.predict(handle_file(tmp_path / f'{i}.png'), api_name='/look')
        images = [part for part in map(_path, answer) if part]
        # The mean colours of stage 1 come after prediction and borders.
        colours = np.asarray(Image.open(images[2]).convert('RGB'))
        return colours.mean(axis=(0, 1))

    with ThreadPoolExecutor(8) as pool:
        for i, colour in enumerate(pool.map(ask, range(8))):
            np.testing.assert_allclose(colour, (30 * i, 255 - 30 * i, 128), atol=3)


def _path(part: object) -> str | None:
    """The file of an image in a client's answer, where updates may be wrapped in a dict."""
    if isinstance(part, dict):
        part = part.get('value', part.get('path'))
    return _path(part) if isinstance(part, dict) else part if str(part).endswith('.png') else None


@pytest.mark.promise(
    'Safety',
    'No file of the server is reachable through the demo page, which listens on 127.0.0.1 by '
    'default',
    '4 files by 5 routes, 2 of a proxy, 2 paths in place of an upload: all refused',
)
@needs_gradio
def test_files_of_the_server_are_out_of_reach(address, checkpoint):
    for path in (
        checkpoint,
        ROOT / 'README.md',
        ROOT / 'configs' / '..' / 'setup.py',
        '/etc/passwd',
    ):
        for route in ('gradio_api/file=', 'file=', 'static/', 'assets/', 'gradio_api/file/'):
            quoted = urllib.parse.quote(str(path))
            with pytest.raises(urllib.error.HTTPError) as refused:
                urllib.request.urlopen(f'{address}{route}{quoted}')
            assert refused.value.code in (403, 404, 405)
    for route in ('gradio_api/proxy=https://example.org/', 'gradio_api/file=https://example.org/'):
        with pytest.raises(urllib.error.HTTPError):
            urllib.request.urlopen(address + route)
    with urllib.request.urlopen(address) as response:
        assert "default-src 'self'" in response.headers['content-security-policy']
        assert address.startswith('http://127.0.0.1:')


@needs_gradio
def test_visitors_are_not_shown_to_each_other(address):
    with pytest.raises(urllib.error.HTTPError) as error:
        urllib.request.urlopen(f'{address}gradio_api/profiling/traces')
    assert error.value.code == 404


@pytest.mark.promise(
    'Safety',
    'No file of the server is reachable through the demo page, which listens on 127.0.0.1 by '
    'default',
)
@needs_gradio
@pytest.mark.parametrize('folder', [ROOT, Path()])
def test_a_visitor_cannot_have_the_server_look_at_its_own_files(folder, address):
    image = folder / 'docs' / 'images' / 'quickstart.jpg'
    given = dict(path=str(image), meta={'_type': 'gradio.FileData'})
    body = json.dumps(dict(data=[given])).encode()
    headers = {'Content-Type': 'application/json'}
    request = urllib.request.Request(f'{address}gradio_api/call/look', body, headers)
    with urllib.request.urlopen(request) as response:
        event = json.load(response)['event_id']
    with urllib.request.urlopen(f'{address}gradio_api/call/look/{event}') as response:
        answer = response.read().decode()
    assert 'event: error' in answer and 'event: complete' not in answer


@pytest.mark.promise('Safety', 'The demo page fetches no address that a visitor names')
@needs_gradio
@pytest.mark.parametrize('kind', ['application/json', 'Application/JSON', 'application/x+json', ''])
@pytest.mark.parametrize('route', ['gradio_api/call/look', 'gradio_api/queue/join'])
def test_no_address_of_a_visitor_is_fetched(route, kind, address):
    asked = []

    class Note(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_error(404)

    with ThreadingHTTPServer(('127.0.0.1', 0), Note) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        url = f'http://127.0.0.1:{server.server_port}/x.png'
        given = dict(path=url, url=url, meta={'_type': 'gradio.FileData'})
        body = json.dumps(dict(data=[given], fn_index=0, session_hash='x')).encode()
        headers = {'Content-Type': kind}
        with pytest.raises(urllib.error.HTTPError) as refused:
            urllib.request.urlopen(urllib.request.Request(address + route, body, headers))
        server.shutdown()
    assert refused.value.code == 400 and b'Upload the file' in refused.value.read()
    assert not asked


def test_without_gradio_the_tool_says_what_to_install(tmp_path, checkpoint):
    hidden = tmp_path / 'gradio'
    hidden.mkdir()
    (hidden / '__init__.py').write_text('raise ImportError')
    arguments = [TOOL, '--config', CONFIG, '--checkpoint', checkpoint]
    result = run_python(*arguments, check=False, site=tmp_path)
    assert result.returncode == 1 and 'pip install "gradio==' in result.stderr
