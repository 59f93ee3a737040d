"""MUNGE credentials through libmunge: the kernel's word on who sent a message, bound to that message.

A binding of a hundred lines over the C library, since no maintained package exists and this one needs no compiler.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib

from msgspec import Struct

from broker.protocol.errors import AuthError, Transient

_OPT_TTL, _OPT_SOCKET, _OPT_UID_RESTRICTION = 4, 8, 9
_SOCKET, _TIMEOUT, _EXPIRED, _REWOUND, _REPLAYED, _UNAUTHORIZED = 6, 7, 15, 16, 17, 18
TTL_S = 60


class Decoded(Struct, frozen=True):
    """A credential that is genuine, fresh and meant for us."""

    payload: bytes
    uid: int
    gid: int


def digest_of(body: bytes, server_key: str) -> bytes:
    """What a credential vouches for: this body, sent to this server."""
    return hashlib.sha256(b"prompttuner\0" + server_key.encode() + b"\0" + body).digest()


@functools.cache
def _library() -> ctypes.CDLL:
    try:
        lib = ctypes.CDLL("libmunge.so.2")
    except OSError as error:
        raise AuthError(f"MUNGE's library cannot be loaded: {error}", "install the package libmunge2") from None
    lib.munge_ctx_create.restype = ctypes.c_void_p
    lib.munge_ctx_destroy.argtypes = [ctypes.c_void_p]
    lib.munge_ctx_strerror.argtypes = [ctypes.c_void_p]
    lib.munge_ctx_strerror.restype = ctypes.c_char_p
    lib.munge_encode.argtypes = [ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int]
    lib.munge_decode.argtypes = [
        ctypes.c_char_p,
        ctypes.c_void_p,
        ctypes.POINTER(ctypes.c_void_p),
        ctypes.POINTER(ctypes.c_int),
        ctypes.POINTER(ctypes.c_uint32),
        ctypes.POINTER(ctypes.c_uint32),
    ]
    return lib


class Munge:
    """One MUNGE context. Not for use by several threads at once."""

    def __init__(self, socket: str | None = None, only_uid: int | None = None) -> None:
        """`socket` is munged's (None: its default); credentials made here can be decoded by `only_uid` alone, if
        given."""
        self._lib = _library()
        self._libc = ctypes.CDLL(None)
        self._libc.free.argtypes = [ctypes.c_void_p]
        self._ctx = ctypes.c_void_p(self._lib.munge_ctx_create())
        self._set(_OPT_TTL, ctypes.c_int(TTL_S))
        if socket:
            self._set(_OPT_SOCKET, ctypes.c_char_p(socket.encode()))
        if only_uid is not None:
            self._set(_OPT_UID_RESTRICTION, ctypes.c_uint32(only_uid))

    def _set(self, option: int, value: object) -> None:
        if self._lib.munge_ctx_set(self._ctx, ctypes.c_int(option), value) != 0:
            raise AuthError(f"MUNGE refused an option: {self._error()}")

    def _error(self) -> str:
        return str((self._lib.munge_ctx_strerror(self._ctx) or b"unknown error").decode("utf-8", "replace"))

    def encode(self, payload: bytes) -> bytes:
        """A credential over `payload` that says who this process is.

        Raises `AuthError` when munged cannot be reached.
        """
        out = ctypes.c_void_p()
        code = self._lib.munge_encode(ctypes.byref(out), self._ctx, payload, len(payload))
        if code != 0:
            raise AuthError(f"MUNGE made no credential: {self._error()}", "is munged running on this host?")
        try:
            return ctypes.string_at(out.value or 0)
        finally:
            self._libc.free(out)

    def decode(self, credential: bytes) -> Decoded:
        """The payload and the kernel-verified uid and gid of who encoded it.

        Raises `AuthError` for a forged, expired, rewound, replayed or foreign credential, `Transient` without munged.
        """
        payload, length = ctypes.c_void_p(), ctypes.c_int()
        uid, gid = ctypes.c_uint32(), ctypes.c_uint32()
        refs = (ctypes.byref(payload), ctypes.byref(length), ctypes.byref(uid), ctypes.byref(gid))
        code = self._lib.munge_decode(credential, self._ctx, *refs)
        try:
            if code == 0:
                return Decoded(ctypes.string_at(payload.value or 0, length.value), uid.value, gid.value)
            raise _refusal(code, self._error())
        finally:
            if payload.value:
                self._libc.free(payload)

    def close(self) -> None:
        if self._ctx.value:
            self._lib.munge_ctx_destroy(self._ctx)
            self._ctx = ctypes.c_void_p()


def _refusal(code: int, text: str) -> AuthError | Transient:
    if code in (_SOCKET, _TIMEOUT):
        return Transient(f"the broker cannot reach munged: {text}", "try again; tell the site's admin if it lasts")
    hints = {
        _EXPIRED: "the clocks of this host and of the broker's differ, or the message was held up: try again",
        _REWOUND: "this host's clock is ahead of the broker's: tell the site's admin",
        _REPLAYED: "the same credential was used before: try again",
        _UNAUTHORIZED: "the credential was made for another service: check broker.user in the site file",
    }
    return AuthError(f"the credential was refused: {text}", hints.get(code, "both hosts need the same MUNGE key"))
