"""A local web page to try a model: predictions, super tokens, attention from a clicked point.

The page works offline and tells browsers to load nothing from other hosts.
"""

from __future__ import annotations

import json
import logging
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from html import escape

from .demo import Demo, DemoResult, drop_gradio_settings
from .image_files import ImageError

try:
    import gradio as gr
    from gradio.profiling import PROFILING_ENABLED
except ImportError as error:
    raise ImportError('the demo page needs gradio: pip install "gradio==6.31.0"') from error

from starlette.middleware import Middleware
from starlette.responses import Response

logger = logging.getLogger(__name__)

POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
MAX_JSON_BYTES = 2**20  # of a request, beside uploads
KEEP_SECONDS = 1800  # how long uploads and pictures are kept
INTRODUCTION = """# {title}
Upload an image to see the model's predictions and the super tokens of its backbone.
Then **click into the picture on the left** to see the attention from that point.
"""


def _table(rows: list[tuple[str, str]]) -> str:
    if not rows:
        return '<p>Nothing was found.</p>'
    lines = ''.join(f'<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>' for a, b in rows)
    return f'<table class="found">{lines}</table>'


class _ContentSecurityPolicy:
    """Middleware that adds :data:`POLICY` to each response."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def send_with_policy(message: dict) -> None:
            if message['type'] == 'http.response.start':
                header = (b'content-security-policy', POLICY.encode())
                message = {**message, 'headers': [*message.get('headers', []), header]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


def _names_address(value: object) -> bool:
    """Whether a file in a request is named by an address, which gradio would fetch."""
    if isinstance(value, dict):
        path = value.get('path')
        return (isinstance(path, str) and '://' in path) or any(map(_names_address, value.values()))
    return isinstance(value, list) and any(map(_names_address, value))


class _NoAddresses:
    """Refuse requests that would have the server fetch an address that a visitor names."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        # FastAPI reads JSON under several content types, and without one. Uploads are multipart.
        kind = dict(scope.get('headers', ())).get(b'content-type', b'').lower()
        if scope.get('method') != 'POST' or kind.startswith(b'multipart/form-data'):
            await self.app(scope, receive, send)
            return
        body, more = b'', True
        while more and len(body) <= MAX_JSON_BYTES:
            message = await receive()
            body, more = body + message.get('body', b''), message.get('more_body', False)
        try:
            refused = len(body) > MAX_JSON_BYTES or _names_address(json.loads(body or b'null'))
        except (ValueError, RecursionError):
            refused = True
        if refused:
            await Response('Upload the file itself.', status_code=400)(scope, receive, send)
            return

        parts = iter([{'type': 'http.request', 'body': body, 'more_body': False}])

        async def receive_again() -> dict:
            return next(parts, None) or await receive()

        await self.app(scope, receive_again, send)


STYLE = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
.found { width: 100%; } .found td { padding: .15rem .5rem; }
.found td:last-child { text-align: right; font-variant-numeric: tabular-nums; }
#message p { background: #fdecea; color: #611a15; padding: .7rem 1rem; border-radius: 6px; }
#picture img { cursor: crosshair; }
footer { display: none !important; }
"""


def build_page(demo: Demo, title: str) -> gr.Blocks:
    """Build the page.

    Args:
        demo: The model to show.
        title: Heading of the page.
    """
    with gr.Blocks(
        title=title, analytics_enabled=False, delete_cache=(KEEP_SECONDS // 4, KEEP_SECONDS)
    ) as page:
        looked = gr.State(None, time_to_live=KEEP_SECONDS)
        gr.Markdown(INTRODUCTION.format(title=escape(title)))
        file = gr.File(label='An image', elem_id='file', height=140)
        message = gr.HTML(elem_id='message', visible=False)
        with gr.Column(visible=False) as results:
            with gr.Row():
                picture = _picture('What the network sees: click into it', 'picture')
                prediction = _picture('What the model finds', 'prediction')
            with gr.Accordion('In figures', open=False):
                found = gr.HTML(elem_id='found')
            layers = dict(enumerate(demo.attentions, 1))
            # Stages without super tokens have one picture each and share a row.
            rows = [[number] for number, layer in layers.items() if layer.has_super_tokens]
            rows.append([number for number, layer in layers.items() if not layer.has_super_tokens])
            placed = {}
            for row in rows:
                with gr.Row():
                    for number in row:
                        placed[number] = _stage_pictures(number, layers[number].has_super_tokens)
            stages = [placed[number] for number in layers]

    attention_outputs = [picture, *(pictures[-1] for pictures in stages)]

    def refusal(text: str) -> dict:
        shown = gr.HTML(f'<p>{escape(text)}</p>', visible=True)
        return {file: None, message: shown, results: gr.Column(visible=False)}

    def look(path: str) -> dict:
        try:
            result = demo.look(path)
        except ImageError as error:
            return refusal(str(error))
        except Exception:  # A model and its pipeline can raise anything.
            logger.exception('the model failed on %s', path)
            return refusal("The model failed on this image. See the server's log for the reason.")
        drawn = {file: None, message: gr.HTML(visible=False), results: gr.Column(visible=True)}
        drawn |= {looked: result, prediction: result.prediction, found: _table(result.found)}
        for pictures, tessellation in zip(stages, demo.tessellations(result)):
            drawn |= dict(zip(pictures[:-1], tessellation))
        return drawn | dict(zip(attention_outputs, demo.attention(result)))

    def look_from(result: DemoResult | None, event: gr.SelectData) -> list:
        if result is None:  # expired after KEEP_SECONDS
            return [None] * len(attention_outputs)
        column, row = event.index
        return demo.attention(result, (row, column))

    others = [component for pictures in stages for component in pictures[:-1]]
    outputs = [file, message, results, looked, prediction, found, *others, *attention_outputs]
    with page:
        file.upload(look, file, outputs, api_name='look')
        picture.select(look_from, looked, attention_outputs, api_visibility='private')
    return page


def _picture(label: str, name: str) -> gr.Image:
    return gr.Image(
        label=label,
        elem_id=name,
        interactive=False,
        format='png',
        buttons=['download', 'fullscreen'],
    )


def _stage_pictures(number: int, samples: bool) -> list[gr.Image]:
    """Components for the pictures of a stage: super tokens, if it samples any, and attention."""
    labels = {'super-tokens': 'super tokens', 'colours': 'their mean colours'} if samples else {}
    labels['attention'] = 'attention from the white marker'
    return [
        _picture(f'Stage {number}: {label}', f'{name}-{number}') for name, label in labels.items()
    ]


@contextmanager
def serve(
    demo: Demo, title: str, host: str = '127.0.0.1', port: int | None = None
) -> Iterator[str]:
    """Serve the page in background threads while the context is entered.

    Uploads and pictures are kept in a private temporary folder, for half an hour or until the
    context is left.

    Args:
        demo: The model to show.
        title: Heading of the page.
        host: Address to listen on; ``'0.0.0.0'`` admits every machine of the network.
        port: Port to listen on; by default the first free one from 7860.

    Yields:
        The address of the page.

    Raises:
        OSError: The port is taken.
        ValueError: gradio was imported with its profiling on, which shows visitors to each other.
    """
    if PROFILING_ENABLED:
        raise ValueError(
            'gradio was imported with GRADIO_PROFILING set, which shows visitors to each other: unset it'
        )
    with tempfile.TemporaryDirectory(prefix='mmsvit-demo-') as folder:
        drop_gradio_settings()
        os.environ['GRADIO_TEMP_DIR'] = folder
        os.environ['GRADIO_ANALYTICS_ENABLED'] = 'False'
        page = build_page(demo, title)
        page.queue(max_size=64, default_concurrency_limit=2)
        fonts = dict(font=['system-ui', 'sans-serif'], font_mono=['ui-monospace', 'monospace'])
        _, address, _ = page.launch(
            server_name=host,
            server_port=port,
            share=False,
            prevent_thread_lock=True,
            quiet=True,
            show_error=False,
            footer_links=[],
            run_history=False,
            enable_monitoring=False,
            ssr_mode=False,
            pwa=False,
            allowed_paths=[],
            max_file_size=demo.max_bytes,
            state_session_capacity=100,
            app_kwargs=dict(
                middleware=[Middleware(_ContentSecurityPolicy), Middleware(_NoAddresses)]
            ),
            theme=gr.themes.Default(**fonts),
            css=STYLE,
        )
        try:
            yield address
        finally:
            page.close(verbose=False)
