"""nginx's variables by name: its own and those of its modules, and those that a configuration shows to exist."""

from __future__ import annotations

import re

from controller.conf.tree import Node

_OWN = frozenset(
    re.findall(
        r"\w+",
        """
    ancient_browser args auth_request_uri binary_remote_addr body_bytes_sent bytes_sent connection
    connection_requests connection_time connections_active connections_reading connections_waiting
    connections_writing content_length content_type date_gmt date_local document_root document_uri
    fastcgi_path_info fastcgi_script_name gzip_ratio host hostname http2 http3 https invalid_referer is_args
    is_request_port limit_conn_status limit_rate limit_req_status memcached_key modern_browser msec msie
    nginx_version pid pipe proxy_add_x_forwarded_for proxy_host proxy_internal_body_length proxy_internal_chunked
    proxy_port proxy_protocol_addr proxy_protocol_port proxy_protocol_server_addr proxy_protocol_server_port
    query_string quic realip_remote_addr realip_remote_port realpath_root remote_addr remote_port remote_user
    request request_body request_body_file request_completion request_filename request_id request_length
    request_method request_port request_time request_uri scheme secure_link secure_link_expires
    sent_http_cache_control sent_http_connection sent_http_content_length sent_http_content_type
    sent_http_keep_alive sent_http_last_modified sent_http_link sent_http_location sent_http_transfer_encoding
    server_addr server_name server_port server_protocol slice_range ssl_alpn_protocol ssl_cipher ssl_ciphers
    ssl_client_cert ssl_client_escaped_cert ssl_client_fingerprint ssl_client_i_dn ssl_client_i_dn_legacy
    ssl_client_raw_cert ssl_client_s_dn ssl_client_s_dn_legacy ssl_client_serial ssl_client_sigalg ssl_client_v_end
    ssl_client_v_remain ssl_client_v_start ssl_client_verify ssl_curve ssl_curves ssl_early_data
    ssl_ech_outer_server_name ssl_ech_status ssl_protocol ssl_server_name ssl_session_id ssl_session_reused
    ssl_sigalg status tcpinfo_rcv_space tcpinfo_rtt tcpinfo_rttvar tcpinfo_snd_cwnd time_iso8601 time_local uid_got
    uid_reset uid_set upstream_addr upstream_bytes_received upstream_bytes_sent upstream_cache_age
    upstream_cache_key upstream_cache_last_modified upstream_cache_status upstream_connect_time
    upstream_header_time upstream_last_server_name upstream_queue_time upstream_response_length
    upstream_response_time upstream_status uri
    """,
    )
)
_FAMILIES = (
    *("arg_", "cookie_", "http_", "sent_http_", "sent_trailer_", "upstream_cookie_", "upstream_http_"),
    *("upstream_trailer_", "proxy_protocol_tlv_", "geoip_", "geoip2_", "jwt_"),
)
_USED = re.compile(r"\$\{?(\w+)")
_CAPTURED = re.compile(r"\(\?P?[<'](\w+)[>']")


def names(text: str) -> list[str]:
    """The variables in a text of nginx: `$name` and `${name}`, each once."""
    return list(dict.fromkeys(_USED.findall(text)))


def known(name: str, conf: Node) -> bool:
    """Whether nginx knows this variable, as far as can be seen: its own, a capture, or one that this configuration
    (which nginx accepts, so all its variables exist) defines or uses."""
    name = name.lower()
    return name.isdigit() or name in _OWN or name.startswith(_FAMILIES) or name in _shown(conf)


def _shown(conf: Node) -> set[str]:
    """The variables that stand anywhere in a configuration."""
    shown: set[str] = set()
    waiting = [conf]
    while waiting:
        node = waiting.pop()
        for text in (node.name, *node.args):
            shown.update(name.lower() for pattern in (_USED, _CAPTURED) for name in pattern.findall(text))
        waiting.extend(node.block or ())
    return shown
