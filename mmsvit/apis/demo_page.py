"""A local web page to try a model: predictions, super tokens, attention from a clicked point.

Nothing is fetched from anywhere: the page works offline, and a browser is told to load
nothing from other places.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from html import escape

from .demo import Demo, DemoResult
from .image_files import ImageError

try:
    import gradio as gr
except ImportError as error:
    raise ImportError('the page needs gradio: pip install "gradio==6.31.0"') from error

from starlette.middleware import Middleware

logger = logging.getLogger(__name__)

POLICY = "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'"
KEEP_SECONDS = 1800  # of uploads and pictures
INTRODUCTION = """# {title}
Give an image to see what the model finds in it, and which super tokens its backbone makes of it.
Then **click into the picture on the left** to see where attention looks from there.
"""


def _table(rows: list[tuple[str, str]]) -> str:
    if not rows:
        return '<p>Nothing was found.</p>'
    lines = ''.join(f'<tr><td>{escape(a)}</td><td>{escape(b)}</td></tr>' for a, b in rows)
    return f'<table class="found">{lines}</table>'


class _ContentSecurityPolicy:
    """Tell browsers to load nothing from elsewhere."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: dict, receive: Callable, send: Callable) -> None:
        async def send_with_policy(message: dict) -> None:
            if message['type'] == 'http.response.start':
                header = (b'content-security-policy', POLICY.encode())
                message = {**message, 'headers': [*message.get('headers', []), header]}
            await send(message)

        await self.app(scope, receive, send_with_policy)


STYLE = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
.found { width: 100%; } .found td { padding: .15rem .5rem; }
.found td:last-child { text-align: right; font-variant-numeric: tabular-nums; }
#message p { background: #fdecea; color: #611a15; padding: .7rem 1rem; border-radius: 6px; }
#picture img { cursor: crosshair; }
footer { display: none !important; }
"""


def build_page(demo: Demo, title: str) -> gr.Blocks:
    """The page.

    Args:
        demo: What it shows.
        title: Its heading.
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
            # Of stages without super tokens there is one picture each: all in a row.
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
        except Exception:  # Whatever a model and its pipeline do not bear.
            logger.exception('%s cannot be worked on', path)
            return refusal('The model cannot work on this image. The log of the server says why.')
        drawn = {file: None, message: gr.HTML(visible=False), results: gr.Column(visible=True)}
        drawn |= {looked: result, prediction: result.prediction, found: _table(result.found)}
        for pictures, tessellation in zip(stages, demo.tessellations(result)):
            drawn |= dict(zip(pictures[:-1], tessellation))
        return drawn | dict(zip(attention_outputs, demo.attention(result)))

    def look_from(result: DemoResult | None, event: gr.SelectData) -> list:
        if result is None:  # kept for too long
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
    """Places for the pictures of a stage: of its super tokens, if it has some, and attention."""
    labels = {'super-tokens': 'super tokens', 'colours': 'their mean colours'} if samples else {}
    labels['attention'] = 'attention from the ring'
    return [
        _picture(f'Stage {number}: {label}', f'{name}-{number}') for name, label in labels.items()
    ]


@contextmanager
def serve(
    demo: Demo, title: str, host: str = '127.0.0.1', port: int | None = None
) -> Iterator[str]:
    """Serve the page in threads of their own while the context is entered.

    Uploads and pictures are kept in a folder that nobody else reads, for half an hour or until
    the end.

    Args:
        demo: What it shows.
        title: Its heading.
        host: Address to listen at; ``'0.0.0.0'`` lets every machine of the network in.
        port: Port to listen at; by default the first that is free from 7860 on.

    Yields:
        The address of the page.

    Raises:
        OSError: The port is taken.
    """
    with tempfile.TemporaryDirectory(prefix='mmsvit-demo-') as folder:
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
            app_kwargs=dict(middleware=[Middleware(_ContentSecurityPolicy)]),
            theme=gr.themes.Default(**fonts),
            css=STYLE,
        )
        try:
            yield address
        finally:
            page.close(verbose=False)
