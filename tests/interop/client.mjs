// A Privacy Pass client (RFC 9577, RFC 9578) of the gateway. Challenges, token requests, tokens and the Authorization
// field are the library's; here is only the HTTP between them.
//
// One JSON object on stdout; exit status 1 and a line on stderr when the exchange cannot be completed. The statuses of
// the redemptions are reported, not judged: whether a token should pass is for the test to say.

import { AuthorizationHeader, MediaType, PRIVATE_TOKEN_ISSUER_DIRECTORY, WWWAuthenticateHeader, privateVerif, publicVerif } from '@cloudflare/privacypass-ts';
import { readFileSync } from 'node:fs';
import https from 'node:https';
import { parseArgs } from 'node:util';

const TIMEOUT_MS = 20_000;

const CLIENTS = {
    [privateVerif.VOPRF.value]: () => new privateVerif.Client(),
    [publicVerif.BLIND_RSA.value]: () => new publicVerif.Client(publicVerif.BlindRSAMode.PSS),
};

const REQUIRED = ['url', 'servername', 'ca', 'body', 'issuer', 'issuer-ca', 'issuer-servername', 'type'];

function options() {
    const string = [...REQUIRED, 'cert', 'key'].map((name) => [name, { type: 'string' }]);
    const flag = ['again', 'tamper'].map((name) => [name, { type: 'boolean', default: false }]);
    const { values } = parseArgs({ options: Object.fromEntries([...string, ...flag]) });
    const missing = REQUIRED.filter((name) => values[name] === undefined);
    if (missing.length > 0) throw new Error(`missing --${missing.join(', --')}`);
    if (!Object.hasOwn(CLIENTS, values.type)) throw new Error(`--type is ${Object.keys(CLIENTS).join(' or ')}, not ${values.type}`);
    if ((values.cert === undefined) !== (values.key === undefined)) throw new Error('--cert and --key belong together');
    return values;
}

/// One request on a connection of its own. `peer` has the name that the certificate must have, and is the Host.
function exchange(url, peer, method, headers, body) {
    return new Promise((resolve, reject) => {
        const { host, ...tls } = peer;
        const fail = (error) => reject(new Error(`${method} ${url}: ${error.message}`));
        const request = https.request(
            url,
            // `rejectUnauthorized`: or NODE_TLS_REJECT_UNAUTHORIZED in the environment could turn it off.
            { method, headers: { host, ...headers }, agent: false, minVersion: 'TLSv1.3', servername: host, rejectUnauthorized: true, ...tls },
            (response) => {
                const parts = [];
                response.on('data', (part) => parts.push(part));
                response.on('error', fail);
                response.on('end', () => resolve({ status: response.statusCode, headers: response.headers, body: Buffer.concat(parts) }));
            },
        );
        request.setTimeout(TIMEOUT_MS, () => request.destroy(new Error(`nothing for ${TIMEOUT_MS} ms`)));
        request.on('error', fail);
        request.end(body);
    });
}

function mediaType(response) {
    return (response.headers['content-type'] ?? '').split(';')[0].trim().toLowerCase();
}

/// The `type` member of a problem document (RFC 9457); null where the response is none.
function problemType(response) {
    if (mediaType(response) !== 'application/problem+json') return null;
    return JSON.parse(response.body.toString()).type ?? null;
}

function redemption(response) {
    return { status: response.status, problem: problemType(response)?.split(':').at(-1) ?? null };
}

function expectOk(response, type, what) {
    if (response.status !== 200) throw new Error(`${what}: status ${response.status}: ${response.body}`);
    if (mediaType(response) !== type) throw new Error(`${what}: content type "${response.headers['content-type']}", not ${type}`);
    return response;
}

/// All challenges of the field, and the one of the wanted type. A client finds the issuer by the name in the challenge:
/// one that names another issuer than the one whose address we were given is of no use.
function challenges(response, type, issuer) {
    // Several fields of this name have been joined with ", " by node, as `fetch` does it (RFC 9110 §5.3).
    const field = response.headers['www-authenticate'];
    if (field === undefined) throw new Error(`status ${response.status} without WWW-Authenticate: ${response.body}`);
    const all = WWWAuthenticateHeader.parse(field);
    if (all.length === 0) throw new Error(`the library reads no challenge in WWW-Authenticate: ${field}`);
    const wanted = all.find(({ challenge }) => challenge.tokenType === type && new URL(`https://${challenge.issuerName}`).hostname === issuer);
    if (wanted === undefined) throw new Error(`no challenge has token type ${type} and names the issuer ${issuer}: ${field}`);
    return { all, wanted };
}

/// A token from the issuer (RFC 9578 §4 and §5 or §6), and how the issuer answered.
async function token(wanted, base, peer) {
    const directoryUrl = new URL(PRIVATE_TOKEN_ISSUER_DIRECTORY, base);
    const answer = await exchange(directoryUrl, peer, 'GET', { accept: MediaType.PRIVATE_TOKEN_ISSUER_DIRECTORY });
    const directory = JSON.parse(expectOk(answer, MediaType.PRIVATE_TOKEN_ISSUER_DIRECTORY, 'the directory').body.toString());

    const { tokenType } = wanted.challenge;
    const published = (directory['token-keys'] ?? []).filter((key) => key['token-type'] === tokenType);
    // The octets are compared: padding is the issuer's choice.
    if (!published.some((key) => Buffer.from(key['token-key'], 'base64url').equals(wanted.tokenKey))) {
        throw new Error(`the challenge's token-key is not in the issuer's directory for token type ${tokenType}`);
    }
    if (typeof directory['issuer-request-uri'] !== 'string') throw new Error('the directory has no issuer-request-uri');
    const { pathname, search } = new URL(directory['issuer-request-uri'], directoryUrl);

    const client = CLIENTS[tokenType]();
    const request = await client.createTokenRequest(wanted.challenge, wanted.tokenKey);
    const headers = { 'content-type': MediaType.PRIVATE_TOKEN_REQUEST, accept: MediaType.PRIVATE_TOKEN_RESPONSE };
    // Whatever host an absolute URI has, the address is the one we were given: test names have no DNS.
    const response = await exchange(new URL(pathname + search, base), peer, 'POST', headers, request.serialize());
    expectOk(response, MediaType.PRIVATE_TOKEN_RESPONSE, 'the token request');
    // This verifies what the issuer made: the signature, or the proof.
    const made = await client.finalize(client.deserializeTokenResponse(new Uint8Array(response.body)));
    return { made, issued: { status: response.status, content_type: response.headers['content-type'] } };
}

async function main() {
    const given = options();
    const read = (name) => given[name] && readFileSync(given[name]);
    const gateway = { host: given.servername, ca: read('ca'), cert: read('cert'), key: read('key') };
    const body = read('body');
    const send = (authorization) =>
        exchange(given.url, gateway, 'POST', { 'content-type': 'application/octet-stream', ...authorization }, body);

    const first = await send({});
    if (first.status !== 401 && first.status !== 429) throw new Error(`the first answer is ${first.status}, not 401 or 429: ${first.body}`);
    const { all, wanted } = challenges(first, Number(given.type), given['issuer-servername']);

    const issuer = { host: given['issuer-servername'], ca: read('issuer-ca') };
    const { made, issued } = await token(wanted, given.issuer, issuer);
    // The authenticator is a token's last field.
    if (given.tamper) made.authenticator[made.authenticator.length - 1] ^= 1;
    const authorization = new AuthorizationHeader(made).toString();

    const redeemed = redemption(await send({ authorization }));
    const again = given.again ? redemption(await send({ authorization })) : null;
    return {
        first: { status: first.status, type: problemType(first) },
        challenges: all.map(({ challenge, maxAge }) => ({
            token_type: challenge.tokenType,
            issuer_name: challenge.issuerName,
            origin_info: challenge.originInfo ?? [],
            redemption_context_len: challenge.redemptionContext.length,
            max_age: maxAge ?? null,
        })),
        issued,
        redeemed,
        again,
    };
}

try {
    console.log(JSON.stringify(await main()));
} catch (error) {
    console.error(`client: ${error.message}`);
    process.exitCode = 1;
}
